"""``lmprune recipe --compensate``: factors that plain mergekit applies, equal to those that the repair folds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_beside import Run
from test_beside import run as run
from test_cut import logits

from lmprune.cuts.compensation import Compensation
from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe
from lmprune.errors import RecipeError
from lmprune.forward.views import pruned_view
from lmprune.healing.scaling import compensate
from lmprune.models.checkpoint import Checkpoint
from lmprune.models.companions import copy_companions
from lmprune.models.cut import open_cut
from lmprune.models.loading import load_model
from lmprune.models.tensors import read_tensor
from lmprune.profiling.run import calibration_tokens
from lmprune.profiling.settings import ProfileSettings
from lmprune.text.sources import DataSettings
from lmprune.writing.pruning import prune
from lmprune.writing.verify import verify

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = ("--data", "demo", "--samples", "8", "--max-length", "32", "--no-check")


@pytest.fixture(params=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny Llama in float32."""
    source = tiny("llama", tie_word_embeddings=request.param == "tied")
    load_model(source, dtype="float32").save_pretrained(tmp_path / "whole")
    copy_companions(source, tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def recipe(folder: Path, tmp_path: Path, run: Run) -> Path:
    """A compensated cut of two places."""
    code, _, told = run("recipe", folder, "--layers", "2-3,5", "-o", tmp_path / "r.yml", "--compensate", *TEXT)
    assert code == 0, told
    return tmp_path / "r.yml"


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: read_tensor(entry) for name, entry in Checkpoint.open(folder).tensors.items()}


def test_it_equals_the_folded_scalar_and_what_plain_mergekit_writes(folder: Path, recipe: Path, tmp_path: Path) -> None:
    from lmprune.writing.mergekit import run_mergekit

    plan = Plan(8, (2, 3, 5))
    settings, data = ProfileSettings(samples=8, max_length=32), DataSettings(data="demo")
    rows = calibration_tokens(open_cut(folder), settings, data).rows
    whole = load_model(folder)
    student = pruned_view(load_model(folder), plan)
    scales = compensate(student, whole, plan, list(rows))
    part = open_cut(recipe).plan.parts[0]  # type: ignore[union-attr]
    assert isinstance(part, Compensation) and part.before == (4, 6)
    assert part.factors == pytest.approx([scale.alpha for scale in scales], rel=0.05), (
        "the text is the first of a profile"
    )
    same = Compensation(part.before, tuple(s.alpha for s in scales), part.layers, part.embeddings, part.norms)
    Recipe.of(str(folder), Plan(8, (2, 3, 5), (same,)), dtype="float32").write(tmp_path / "same.yml", str(folder))
    live = logits(open_cut(tmp_path / "same.yml").load())
    torch.testing.assert_close(live, logits(student), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(live, logits(pruned_view(whole, plan)), atol=1e-2)

    data_of = yaml.safe_load((tmp_path / "same.yml").read_text())
    del data_of["lmprune"]
    run_mergekit(data_of, tmp_path / "plain")
    prune(tmp_path / "same.yml", tmp_path / "copied", writer="copy")
    prune(tmp_path / "same.yml", tmp_path / "merged", writer="mergekit")
    plain, copied, merged = (_weights(tmp_path / name) for name in ("plain", "copied", "merged"))
    assert set(plain) == set(copied) == set(merged)
    for name, tensor in plain.items():
        assert torch.equal(tensor, copied[name]) and torch.equal(tensor, merged[name]), name
    assert torch.equal(logits(load_model(tmp_path / "plain")), live)
    assert not verify(tmp_path / "same.yml", tmp_path / "plain").differences


def test_a_view_is_scaled_and_the_whole_model_is_not(folder: Path, recipe: Path) -> None:
    whole, cut = load_model(folder), open_cut(recipe)
    before = logits(whole)
    view = pruned_view(whole, cut.plan)
    assert torch.equal(logits(view), logits(cut.load())) and torch.equal(logits(whole), before)


def test_the_recipe_says_what_mergekit_does_and_nothing_else(recipe: Path, tmp_path: Path) -> None:
    data = yaml.safe_load(recipe.read_text())
    assert data["merge_method"] == "passthrough"
    part = data["lmprune"]["parts"]["compensation"]
    assert part["before"] == [4, 6] and part["layers"] == ["self_attn.o_proj.weight", "mlp.down_proj.weight"]
    filters = [source.get("parameters") for piece in data["slices"] for source in piece["sources"]]
    assert filters[0]["scale"][-1] == {"value": 1.0} and len(filters) == 4 + ("norms" in part)

    def changed(change: Callable[[Any], None]) -> Any:
        other = json.loads(json.dumps(data))
        change(other)
        return other

    for change, said in (
        (lambda d: d["slices"][0]["sources"][0]["parameters"]["scale"][0].update(value=2.0), "of layer 0 should have"),
        (lambda d: d["slices"][0]["sources"][0].pop("parameters"), "of layer 0 should have"),
        (lambda d: d["lmprune"].pop("parts"), "ask for more than a choice of layers"),
        (lambda d: d["lmprune"]["parts"]["compensation"].update(factors=[1.0]), "give a number above 0 for each"),
        (lambda d: d["lmprune"]["parts"]["compensation"].update(factors=[-1.0, 1.0]), "give a number above 0"),
        (lambda d: d["lmprune"]["parts"]["compensation"].update(factors=[float("inf"), 1.0]), "give a number above 0"),
        (lambda d: d["lmprune"]["parts"]["compensation"].update(before=[4, 4]), "ascending"),
        (lambda d: d["lmprune"]["parts"]["compensation"].update(before=[3, 6]), "layer 3 is dropped"),
        (lambda d: d["lmprune"]["parts"]["compensation"].update(layers=[]), "layers is empty"),
        (lambda d: d["lmprune"]["parts"]["compensation"].update(layers=["*"]), "list the names of tensors"),
        (lambda d: d["lmprune"]["parts"]["compensation"].update(more=1), "unknown key 'more'"),
    ):
        with pytest.raises(RecipeError, match=said):
            Recipe.from_data(changed(change))
    Recipe.from_data(data)


def test_slices_may_be_divided_otherwise(recipe: Path) -> None:
    data = yaml.safe_load(recipe.read_text())
    first = data["slices"][1]["sources"][0]
    start, stop = first["layer_range"]
    pieces = [{"sources": [{**first, "layer_range": [at, at + 1]}]} for at in range(start, stop)]
    again = Recipe.from_data({**data, "slices": [data["slices"][0], *pieces, *data["slices"][2:]]})
    assert again == Recipe.from_data(data) and len(pieces) >= 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("{gemma}", "--layers", "3-4", "--compensate"), "stores its norms less 1"),
        (("{llama}", "--layers", "6-7", "--compensate"), "no layer follows a cut"),
        (("{recipe}", "--rebase", "--compensate"), "--compensate has no effect"),
        (("{recipe}", "--layers", "3", "--compensate"), "is cut already. Give the uncut model"),
    ],
)
def test_what_cannot_be_compensated_is_said(
    words: tuple[str, ...], said: str, tiny: Callable[..., Path], tmp_path: Path, run: Run
) -> None:
    from lmprune.choosing import write_recipe

    given = {"gemma": tiny("gemma2", head_dim=16), "llama": tiny("llama"), "recipe": tmp_path / "cut.yml"}
    write_recipe(tiny("llama"), Plan(8, (2,)), tmp_path / "cut.yml")
    text = TEXT if "--rebase" not in words else ()
    code, _, told = run("recipe", *(word.format(**given) for word in words), "-o", tmp_path / "x.yml", *text)
    assert code in (1, 2) and said in told and len(told.strip().splitlines()) == 1, told
    assert not (tmp_path / "x.yml").exists()


def test_a_checkpoint_without_such_a_tensor_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    part = Compensation((4,), (1.5,), ("mlp.other.weight",))
    recipe = Recipe.of(str(tiny("llama")), Plan(8, (3,), (part,)))
    recipe.write(tmp_path / "r.yml")
    with pytest.raises(Exception, match=r"scales mlp\.other\.weight, and this checkpoint holds nothing"):
        open_cut(tmp_path / "r.yml").load()
