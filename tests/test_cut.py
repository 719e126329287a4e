"""Whatever stands in a model's place is opened one way; a plan of any kind is one plan everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from test_cli import invoke

from lmprune.choosing import write_recipe
from lmprune.cuts import kinds
from lmprune.cuts.lineage import Lineage
from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe
from lmprune.errors import LmpruneError, ModelError, RecipeError, UsageError, VerifyError
from lmprune.forward.views import pruned_view
from lmprune.models import carrying
from lmprune.models.cut import Cut, open_cut
from lmprune.models.locate import demo_folder
from lmprune.writing.pruning import prune
from lmprune.writing.verify import verify

DROPPED = (2, 5)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "f" * 40


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``r.yml``, the cut of a tiny Llama, ``pruned``, and ``adapter``, trained on that cut."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("cut")
    write_recipe(tiny("llama"), Plan(8, DROPPED), folder / "r.yml")
    prune(folder / "r.yml", folder / "pruned", logits=False)
    cut = open_cut(folder / "r.yml")
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(cut.load(), config).save_pretrained(folder / "adapter")
    cut.lineage.write(folder / "adapter")
    return folder


@pytest.fixture
def hub(made: Path, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub that holds ``org/base`` in two revisions and ``org/cut``, a recipe of it."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    recipe = Recipe.of("org/base", Plan(8, DROPPED), revision=OLDER)
    for repository, revisions in (("base", {"main": COMMIT, "older": OLDER}), ("cut", {"main": COMMIT})):
        folder = cache / f"models--org--{repository}"
        (folder / "refs").mkdir(parents=True)
        (folder / "snapshots").mkdir()
        for name, commit in revisions.items():
            (folder / "refs" / name).write_text(commit)
            if repository == "base":
                (folder / "snapshots" / commit).symlink_to(tiny("llama"))
            else:
                (folder / "snapshots" / commit).mkdir()
                (folder / "snapshots" / commit / "recipe.yml").write_text(recipe.to_yaml(f"org/base@{OLDER}"))
    return cache


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.arange(2, 42).view(2, 20)).logits.float()
    return found


# what a user writes -> layers left, what is left out while reading, the adapter
FORMS = {
    "{made}/r.yml": (6, DROPPED, False),
    "{made}/pruned": (6, None, False),
    "{made}/r.yml+{made}/adapter": (6, DROPPED, True),
    "{made}/adapter": (6, DROPPED, True),
    "{made}/pruned+{made}/adapter": (6, None, False),
    "{base}": (8, None, False),
    "org/base": (8, None, False),
    "org/base@older": (8, None, False),
    "org/cut": (6, DROPPED, False),
    "demo": (12, None, False),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_opened(form: str, made: Path, hub: Path, tiny: Callable[..., Path]) -> None:
    layers, dropped, adapted = FORMS[form]
    cut = open_cut(form.format(made=made, base=tiny("llama")))
    assert cut.layers == layers
    assert (cut.plan.dropped if cut.plan else None) == dropped
    assert (cut.adapter is not None) == adapted
    assert open_cut(cut.name).fingerprint == cut.fingerprint, "its name opens the same again"


def test_all_forms_of_one_cut_are_one_model(made: Path, hub: Path) -> None:
    want = logits(open_cut(made / "r.yml").load())
    for form in (made / "pruned", "org/cut"):
        assert torch.equal(logits(open_cut(form).load()), want)
    healed = logits(open_cut(f"{made}/r.yml+{made}/adapter").load())
    assert torch.equal(logits(open_cut(made / "adapter").load()), healed)
    assert not torch.equal(healed, want)


def test_revisions_are_pinned(hub: Path) -> None:
    assert open_cut("org/base@older").base.revision == OLDER
    assert open_cut("org/base", "older").base.revision == OLDER
    assert open_cut("org/base").base.revision == COMMIT
    assert open_cut("org/cut").base.revision == OLDER, "the recipe's own"
    with pytest.raises(UsageError, match="another"):
        open_cut("org/base@older", "main")


@pytest.mark.parametrize(
    ("word", "error", "said"),
    [
        ("nothing.yml", RecipeError, "no recipe at"),
        ("nothing", ModelError, "no model at 'nothing'"),
        ("{made}/r.yml+nowhere", ModelError, "no adapter at 'nowhere'"),
        ("org/absent", LmpruneError, "org/absent"),
    ],
)
def test_what_is_not_there(
    word: str, error: type[LmpruneError], said: str, made: Path, hub: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=said):
        open_cut(word.format(made=made))


def test_a_recipe_on_a_recipe_is_refused(made: Path) -> None:
    with pytest.raises(UsageError, match="is a recipe itself"):
        open_cut(made / "r.yml", recipe=made / "r.yml")


def test_every_command_takes_a_recipe_of_the_hub(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))

    def call(*words: str) -> Any:
        code, out, err = invoke(capsys, monkeypatch, *words)
        assert code == 0, err
        return out

    text = ("--data", "demo", "--samples", "4", "--max-length", "16")
    call("profile", "org/cut", "-o", "p.json", *text)
    assert json.loads((tmp_path / "p.json").read_text())["layers"] == 6
    call("recipe", "p.json", "-o", "further.yml", "--drop", "1")
    further = Recipe.read(tmp_path / "further.yml")
    assert further.model == "org/base" and set(DROPPED) < set(further.plan.dropped) and len(further.plan.kept) == 5
    call("prune", "org/cut", "out")
    call("verify", "org/cut", "out")
    call("bench", "org/cut", "--prompts", "4", "--batch-sizes", "1", "--tokens", "2", "--warmup", "1")
    call("heal", "org/cut", "healed", "--data", "demo", "--steps", "1", "--batch-size", "1", "--max-length", "16",
         "--eval-blocks", "1")  # fmt: skip
    told = Lineage.read(tmp_path / "healed")
    assert told is not None and told.healed and told.base.model == "org/base" and told.plan == Plan(8, DROPPED)
    call("eval", "--model_args", "pretrained=org/cut", "--tasks", "lmprune_demo_facts", "--limit", "2",
         "--device", "cpu", "--output_path", "results")  # fmt: skip
    (results,) = (tmp_path / "results").rglob("results_*.json")
    assert json.loads(results.read_text())["config"]["lmprune_layers_dropped"] == list(DROPPED)


def test_the_demos_text_is_inherited(tmp_path: Path) -> None:
    write_recipe("demo", Plan(12, (4,)), tmp_path / "r.yml")
    prune(tmp_path / "r.yml", tmp_path / "out", logits=False)
    write_recipe(tmp_path / "out", Plan(11, (7,)), tmp_path / "again.yml")
    prune(tmp_path / "again.yml", tmp_path / "twice", logits=False)
    for model in ("demo", demo_folder(), tmp_path / "r.yml", tmp_path / "out", tmp_path / "again.yml"):
        assert open_cut(model).default_data == "demo", model


def test_a_checkpoint_knows_the_model_that_it_was_cut_from(made: Path, tiny: Callable[..., Path]) -> None:
    for model in (made / "r.yml", made / "pruned"):
        origin = open_cut(model).origin
        assert origin.base is not None and origin.base.path == tiny("llama") and origin.plan == Plan(8, DROPPED)
    assert open_cut(tiny("llama")).origin.base is None


def test_lineage_survives_its_file(made: Path, tmp_path: Path) -> None:
    told = Lineage.read(made / "pruned")
    assert told is not None and told.stage == "prune" and told.plan == Plan(8, DROPPED)
    told.write(tmp_path)
    assert Lineage.read(tmp_path) == told
    assert json.loads((tmp_path / "lmprune.json").read_text()) == json.loads((made / "pruned/lmprune.json").read_text())


@pytest.mark.parametrize(
    "text", ["[]", "5", "{", '{"stage": 3}', '{"dropped": [1], "layers": 8, "kept": [0]}', '{"base": "x"}']
)
def test_a_lineage_that_makes_no_sense_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "lmprune.json").write_text(text)
    with pytest.raises(ModelError, match=r"lmprune\.json"):
        Lineage.read(tmp_path)


# --- kinds of plan ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Halved:
    """A trial kind: only the first half of the FFN's neurons stays, in every layer."""

    kind: ClassVar[str] = "halved"
    mergekit: ClassVar[bool] = False
    beside: ClassVar[None] = None
    times: int = 1

    def to_data(self) -> Any:
        return self.times

    def describe(self) -> str:
        return "half of the neurons"


def _fields(part: Halved, plan: Plan, config: Any) -> dict[str, Any]:
    return {"intermediate_size": config["intermediate_size"] // 2}


def _change(part: Halved, plan: Plan, name: str) -> Any:
    if name.endswith(("gate_proj.weight", "up_proj.weight")):
        return lambda tensor: tensor[: tensor.shape[0] // 2]
    if name.endswith("down_proj.weight"):
        return lambda tensor: tensor[:, : tensor.shape[1] // 2]
    return None


def _changes(part: Halved, plan: Plan, source: Any) -> dict[str, Any]:
    return {name: change for name in source.shapes if (change := _change(part, plan, name)) is not None}


def _live(part: Halved, plan: Plan, model: Any) -> None:
    for name, parameter in model.named_parameters():
        change = _change(part, plan, name)
        if change is not None:
            parameter.data = change(parameter.data)
    model.config.intermediate_size //= 2


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch, tiny: Callable[..., Path]) -> Cut:
    """The tiny Llama without two layers and half of its neurons."""
    monkeypatch.setitem(kinds.KINDS, "halved", lambda data, layers, where, folder: Halved(data))
    monkeypatch.setitem(carrying.CARRIERS, "halved", carrying.Carrier(_fields, _changes, _live))
    return open_cut(tiny("llama")).without(Plan(8, DROPPED, (Halved(),)), "halved")


def test_a_new_kind_of_plan_is_carried_out_everywhere(halved: Cut, tmp_path: Path) -> None:
    written = write_recipe(halved.base.name, halved.plan or Plan(8), tmp_path / "r.yml")
    again = open_cut(tmp_path / "r.yml")
    assert again.plan == halved.plan and again.config["intermediate_size"] == 64
    assert written.recipe.hash != Recipe.of(halved.base.name, Plan(8, DROPPED)).hash
    want = logits(again.load())
    assert torch.equal(logits(pruned_view(open_cut(halved.base.path).load(), again.plan)), want)
    done = prune(tmp_path / "r.yml", tmp_path / "out")
    assert done.writer == "copy" and done.proof is not None and done.proof.logits_compared
    assert torch.equal(logits(open_cut(tmp_path / "out").load()), want)
    assert done.plan.describe() == "drops 2 of 8 layers: 2,5; half of the neurons"


def test_a_kind_that_mergekit_cannot_express_is_refused_by_it(halved: Cut, tmp_path: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge_methods import get as method

    write_recipe(halved.base.name, halved.plan or Plan(8), tmp_path / "r.yml")
    data = yaml.safe_load((tmp_path / "r.yml").read_text())
    with pytest.raises(RuntimeError, match="lmprune"):
        method(MergeConfiguration.model_validate(data).merge_method)
    with pytest.raises(UsageError, match="mergekit cannot cut half of the neurons"):
        prune(tmp_path / "r.yml", tmp_path / "out", writer="mergekit")


def test_the_proof_sees_a_kind_that_was_not_carried_out(
    halved: Cut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(halved.base.name, halved.plan or Plan(8), tmp_path / "r.yml")
    prune(tmp_path / "r.yml", tmp_path / "out")
    other = carrying.Carrier(
        _fields,
        lambda part, plan, source: {
            name: (lambda tensor: tensor[-(tensor.shape[0] // 2) :]) if "gate_proj" in name else change
            for name, change in _changes(part, plan, source).items()
        },
        _live,
    )
    monkeypatch.setitem(carrying.CARRIERS, "halved", other)
    found = verify(tmp_path / "r.yml", tmp_path / "out").differences
    assert len(found) == 6 and "gate_proj.weight is not what its part of the plan makes of it" in found[0]
    with pytest.raises(VerifyError, match="gate_proj"):
        verify(tmp_path / "r.yml", tmp_path / "out").require(tmp_path)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"width": {"intermediate_size": 64}}, "parts.width"),
        ({"widht": {}}, "no kind 'widht' of cut .did you mean 'width'"),
        ([1], "which is not a mapping of kinds"),
    ],
)
def test_kinds_that_cannot_be_carried_out_are_refused_by_name(parts: Any, said: str, made: Path) -> None:
    data = yaml.safe_load((made / "r.yml").read_text())
    data["lmprune"]["parts"] = parts
    with pytest.raises(RecipeError, match=said):
        Recipe.from_data(data)


def test_scaled_slices_are_refused_by_name(made: Path) -> None:
    data = yaml.safe_load((made / "r.yml").read_text())
    scaled = {"scale": [{"filter": "o_proj", "value": 0.0}, {"value": 1.0}]}
    data["slices"][0]["sources"][0]["parameters"] = scaled
    with pytest.raises(RecipeError, match="ask for more than a choice of layers"):
        Recipe.from_data(data)
    del data["slices"][0]["sources"][0]["parameters"]
    with pytest.raises(RecipeError, match="by its parts it should be 'passthrough'"):
        Recipe.from_data(data | {"merge_method": "lmprune"})
