"""A file of tensors beside a recipe goes where the recipe goes, and is used only where it is the one that it names."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from safetensors.torch import save
from test_cli import invoke
from test_cut import logits
from test_pushing import hub as hub

from lmprune.choosing import rebase, write_recipe
from lmprune.cuts import beside, kinds, library
from lmprune.cuts.beside import Beside
from lmprune.cuts.lineage import Lineage
from lmprune.cuts.plan import Plan
from lmprune.errors import LmpruneError, ModelError, RecipeError
from lmprune.evaluation.plugin import LmpruneLM
from lmprune.models import carrying
from lmprune.models.cut import open_cut, read_recipe
from lmprune.models.tensors import tensors_beside
from lmprune.sharing.pushing import push
from lmprune.writing.pruning import prune

DROPPED = (2, 5)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line: exit code, stdout, stderr."""
    return partial(invoke, capsys, monkeypatch)


@dataclass(frozen=True)
class Damped:
    """A trial kind: what the first layer's MLP writes is multiplied by the vector in its file."""

    kind: ClassVar[str] = "damped"
    mergekit: ClassVar[bool] = False
    beside: Beside

    def to_data(self) -> Any:
        return self.beside.to_data()

    def describe(self) -> str:
        return "a damped MLP"

    @classmethod
    def read(cls, data: Any, layers: int, where: str, folder: Path | None) -> Damped:
        return cls(Beside.read(data, cls.kind, where, folder))


def _changes(part: Damped, plan: Plan, source: Any) -> dict[str, Any]:
    factors = tensors_beside(part.beside)["factors"]
    names = [name for name in source.shapes if name.endswith("layers.0.mlp.down_proj.weight")]
    return {name: lambda tensor: tensor * factors[:, None].to(tensor) for name in names}


def _live(part: Damped, plan: Plan, model: Any) -> None:
    weight = model.get_submodule("model.layers.0.mlp.down_proj").weight
    weight.data *= tensors_beside(part.beside)["factors"][:, None].to(weight)


@pytest.fixture
def damped(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of a tiny Llama with a file beside it."""
    monkeypatch.setitem(kinds.KINDS, "damped", Damped.read)
    monkeypatch.setitem(carrying.CARRIERS, "damped", carrying.Carrier(lambda *given: {}, _changes, _live))
    width = open_cut(tiny("llama")).config["hidden_size"]
    torch.manual_seed(3)
    made = Beside.of(save({"factors": torch.rand(width)}), "r.damped.safetensors", tmp_path / "made")
    return write_recipe(tiny("llama"), Plan(8, DROPPED, (Damped(made),)), tmp_path / "made" / "r.yml").path


def _said(folder: Path, **changes: Any) -> None:
    data = yaml.safe_load((folder / "r.yml").read_text())
    data["lmprune"]["parts"]["damped"] |= changes
    (folder / "r.yml").write_text(yaml.safe_dump(data))


def test_the_file_is_named_and_hashed_and_goes_with_the_recipe(damped: Path, tmp_path: Path, run: Run) -> None:
    content = (damped.parent / "r.damped.safetensors").read_bytes()
    said = yaml.safe_load(damped.read_text())
    assert said["lmprune"]["parts"] == {
        "damped": {"file": "r.damped.safetensors", "sha256": sha256(content).hexdigest()}
    }
    assert said["merge_method"] == "lmprune"
    want = logits(open_cut(damped).load())
    assert not torch.equal(want, logits(open_cut(open_cut(damped).base.path).without(Plan(8, DROPPED), "bare").load()))
    rebase(damped, tmp_path / "other" / "again.yml")
    damped = damped.rename(tmp_path / "moved.yml")  # without its file
    with pytest.raises(RecipeError, match=r"needs r\.damped\.safetensors beside it, and .* does not exist"):
        open_cut(damped)
    assert torch.equal(logits(open_cut(tmp_path / "other" / "again.yml").load()), want)
    prune(tmp_path / "other" / "again.yml", tmp_path / "out")
    shutil.rmtree(tmp_path / "other")
    assert torch.equal(logits(open_cut(tmp_path / "out").load()), want)
    assert torch.equal(logits(open_cut(tmp_path / "out" / "recipe.yml").load()), want)
    told = Lineage.read(tmp_path / "out")
    assert told is not None and told.plan == open_cut(tmp_path / "out" / "recipe.yml").plan
    assert run("verify", tmp_path / "out" / "recipe.yml", tmp_path / "out")[0] == 0
    assert "a damped MLP" in run("show", tmp_path / "out")[1]


def test_a_plan_is_what_its_file_holds_and_not_what_it_is_called(damped: Path, tmp_path: Path) -> None:
    folder = damped.parent
    before, cut = read_recipe(str(damped)), open_cut(damped)
    (folder / "r.damped.safetensors").rename(folder / "s.damped.safetensors")
    _said(folder, file="s.damped.safetensors")
    again = read_recipe(str(damped))
    assert again.hash == before.hash and again.plan == before.plan and open_cut(damped).fingerprint == cut.fingerprint
    _said(folder, sha256=Beside.of(b"other", "t.damped.safetensors", folder).sha256, file="t.damped.safetensors")
    other = read_recipe(str(damped))
    assert other.hash != before.hash and other.plan != before.plan


def test_a_file_never_takes_anothers_place(damped: Path, tmp_path: Path) -> None:
    Beside.of(b"another recipe's", "r.damped.safetensors", tmp_path / "other")
    rebase(damped, tmp_path / "other" / "r.yml")
    assert (tmp_path / "other" / "r.damped.safetensors").read_bytes() == b"another recipe's"
    assert open_cut(tmp_path / "other" / "r.yml").plan == open_cut(damped).plan
    rebase(damped, tmp_path / "other" / "r.yml")
    assert len(list((tmp_path / "other").glob("*.safetensors"))) == 2


def _hostile(folder: Path, what: str) -> None:
    """Give the recipe in ``folder`` a bad file."""
    file = folder / "r.damped.safetensors"
    if what == "other":
        file.write_bytes(file.read_bytes()[:-1] + b"\1")
    elif what == "link":
        (folder.parent / "secret").write_bytes(file.read_bytes())
        file.unlink()
        file.symlink_to(folder.parent / "secret")
    elif what == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes({"header": b"\xff" * 8 + b"{}", "empty": b""}[what])
        _said(folder, sha256=sha256(file.read_bytes()).hexdigest())


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("other", "does not fit its recipe: its SHA-256 is [0-9a-f]{12}..., and the recipe names"),
        ("link", "no file of its folder"),
        ("folder", "no file of its folder"),
        ("header", "cannot be read: .*[Hh]eader"),
        ("empty", "cannot be read"),
    ],
)
def test_another_file_is_refused(what: str, said: str, damped: Path, tmp_path: Path, run: Run) -> None:
    _hostile(damped.parent, what)
    with pytest.raises(RecipeError, match=said):
        open_cut(damped).load()
    code, _, told = run("prune", damped, tmp_path / "out")
    assert code == 1 and told.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"file": "../r.damped.safetensors"}, {"file": "/etc/r.damped.safetensors"}, {"file": "model.safetensors"},
        {"file": ".damped.safetensors"}, {"file": "a\\b.damped.safetensors"}, {"file": "é.damped.safetensors"},
        {"file": "x" * 300 + ".damped.safetensors"}, {"file": 3}, {"file": None}, {"file": "r.damped.safetensors\n"},
        {"sha256": "ab"}, {"sha256": None}, {"sha256": "A" * 64},
    ],
    ids=str,
)  # fmt: skip
def test_only_a_plain_name_and_a_hash_will_do(changes: dict[str, Any], damped: Path) -> None:
    _said(damped.parent, **changes)
    with pytest.raises(RecipeError, match=rf"parts\.damped\.{min(changes)} is "):
        read_recipe(str(damped))


def test_a_large_file_is_not_read(damped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "LARGEST", 100)
    with pytest.raises(RecipeError, match="larger than 0 MiB, which no recipe needs"):
        open_cut(damped)


def test_from_the_library_and_in_the_harness(damped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "recipes_folder", lambda: damped.parent)
    monkeypatch.setattr(library, "names", lambda: ("r",))
    want = logits(open_cut(damped).load())
    assert torch.equal(logits(open_cut("r").load()), want)
    base = str(open_cut(damped).base.path)
    assert torch.equal(logits(LmpruneLM(base, recipe="r", device="cpu").model), want)


def test_to_the_hub_and_back(hub: Any, damped: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"org/base": open_cut(damped).base.path}
    push(damped, "ada/small", base="org/base")
    assert {"recipe.yml", "r.damped.safetensors"} <= set(hub.files("ada/small"))
    base = dict((file.name, file.read_bytes()) for file in known["org/base"].iterdir() if file.is_file())
    hub.repositories["org/base"] = type(hub.repositories["ada/small"])()
    hub.repositories["org/base"].commit(base)
    shutil.rmtree(damped.parent)
    hub.log.clear()
    assert "a damped MLP" in run("show", "ada/small")[1]
    assert not any("damped" in line for line in hub.log), "nothing large is fetched to look"
    assert open_cut("ada/small").layers == 6
    hub.repositories["ada/small"].commit({**hub.files("ada/small"), "r.damped.safetensors": b"forged"})
    with pytest.raises(RecipeError, match="does not fit its recipe"):
        open_cut("ada/small")
    monkeypatch.setattr("lmprune.models.cut.LARGEST", 3)
    hub.repositories["ada/small"].commit({**hub.files("ada/small"), "notes.md": b""})
    with pytest.raises(ModelError, match=r"such a file is at most .* It was not fetched"):
        open_cut("ada/small")
    without = {name: content for name, content in hub.files("ada/small").items() if "damped" not in name}
    hub.repositories["ada/small"].commit(without)
    with pytest.raises(LmpruneError, match=r"beside it, and .* does not exist"):
        open_cut("ada/small")
