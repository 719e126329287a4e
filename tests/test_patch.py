"""Patches: what their methods claim, and that every command applies one or refuses it in one line."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from test_beside import Run
from test_beside import run as run
from test_cut import logits
from test_pushing import hub as hub
from torch import Tensor
from toys import LAYERS, model_of, student_of

from lmprune.benching.draft_rows import DraftSettings
from lmprune.benching.drafting import draft, texts
from lmprune.benching.measuring import bench
from lmprune.benching.settings import BenchSettings
from lmprune.choosing import choose, rebase, write_recipe
from lmprune.comparing import compare
from lmprune.cuts.beside import Beside
from lmprune.cuts.patch import Patch
from lmprune.cuts.plan import Plan
from lmprune.errors import DataError, PlanError, RecipeError, UsageError
from lmprune.evaluation.plugin import LmpruneLM
from lmprune.forward.agreement import agreement
from lmprune.forward.batches import Batch
from lmprune.forward.views import Views, pruned_view
from lmprune.healing.distilling import divergence
from lmprune.healing.methods.base import Patching
from lmprune.healing.methods.ghost import Ghost
from lmprune.healing.methods.linear_patch import LinearPatch
from lmprune.healing.patching import Gap, gaps_of, put_into, states_at, write_patched
from lmprune.healing.repairing import Repair
from lmprune.models.cut import Cut, open_cut
from lmprune.models.hadamard import hadamard
from lmprune.models.patches import changes_of, put_behind
from lmprune.models.stack import find_stack
from lmprune.profiling import ProfileSettings
from lmprune.sharing.pushing import push
from lmprune.sweeping.run import SweepRun
from lmprune.sweeping.settings import SweepSettings
from lmprune.text.sources import DataSettings

pytestmark = pytest.mark.usefixtures("one_thread")
PLAN = Plan(LAYERS, (2, 3))


def rows_of(count: int, length: int = 32) -> NDArray[np.int32]:
    return np.random.default_rng(0).integers(3, 96, (count, length)).astype(np.int32)


@torch.no_grad()
def states(model: Any, rows: NDArray[np.int32], *places: int) -> list[Tensor]:
    """Inputs of these layers, (tokens, width); the number of layers stands for what leaves the last."""
    found: list[Tensor] = []
    hidden = model.model(torch.from_numpy(rows.astype(np.int64)), output_hidden_states=True).hidden_states
    for place in places:
        found.append(hidden[place].flatten(0, 1))
    return found


@torch.no_grad()
def said(model: Any, rows: NDArray[np.int32]) -> Tensor:
    found: Tensor = model(torch.from_numpy(rows.astype(np.int64))).logits
    return found


def work_on(whole: Any, plan: Plan = PLAN, rows: Any = None) -> Repair:
    return Repair(student_of(whole, plan), whole, plan, rows_of(24) if rows is None else rows, rows_of(2))


# --- the methods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 12, 15, 20, 28, 36, 52, 60, 64, 100, 108, 128, 140, 640, 896, 1152])
def test_the_rotation_is_orthonormal_for_any_width(width: int) -> None:
    found = hadamard(width)
    torch.testing.assert_close(found @ found.T, torch.eye(width).double(), atol=1e-10, rtol=0)
    if width in (1, 2, 4, 12, 20, 28, 36, 60, 64, 108, 128, 140, 640, 896, 1152):
        torch.testing.assert_close(found.abs(), torch.full_like(found, width**-0.5))
    assert found.abs().max() <= 1.5 * width**-0.5, "no entry is large"


def test_a_planted_linear_layer_is_recovered_exactly() -> None:
    """A layer that is a linear map goes, and the patch is that map."""
    whole, generator = model_of("llama"), torch.Generator().manual_seed(1)
    planted = 0.3 * torch.randn(32, 32, generator=generator)
    whole.model.layers[2].forward = lambda state, *args, **kwargs: state + state @ planted
    plan = Plan(LAYERS, (2,))
    work = work_on(whole, plan)
    spoilt = said(work.student, work.held_out)
    noted = Ghost(ridge=0.0).repair(work)
    assert work.maps is not None and noted is not None and noted["left"] == [0.0]
    torch.testing.assert_close(work.maps["1.change"], planted, atol=1e-4, rtol=1e-4)
    wanted = said(whole, work.held_out)
    assert (said(work.student, work.held_out) - wanted).norm() < 1e-4 * (spoilt - wanted).norm()


@pytest.mark.parametrize("ridge", [float("inf"), 1e60])
def test_a_ridge_without_end_leaves_the_cut_model_bit_for_bit(ridge: float) -> None:
    work = work_on(model_of("llama"))
    before = said(work.student, work.held_out)
    Ghost(ridge=ridge).repair(work)
    assert torch.equal(said(work.student, work.held_out), before)
    Ghost(ridge=1e-3).repair(work)
    assert not torch.equal(said(work.student, work.held_out), before)


@pytest.mark.parametrize("dropped", [(2, 3), (1, 4), (4, 5)])
def test_maps_are_those_of_the_formulas(dropped: tuple[int, ...]) -> None:
    """Against naive renderings, in float64, of both papers; a cut at the end counts too."""
    whole, plan = model_of("llama"), Plan(LAYERS, dropped)
    work, kept = work_on(whole, plan), {}
    # What leaves the last layer comes before the final norm.
    find_stack(whole).layers[-1].register_forward_hook(lambda module, given, state: kept.update(last=state))
    entered = states(whole, work.calibration, *range(LAYERS))
    entered.append(kept["last"].flatten(0, 1))
    ghost, _ = Ghost(ridge=1e-3).maps(work)
    linear, _ = LinearPatch().maps(work)
    for gap in gaps_of(plan):
        before, after = entered[gap.first].double(), entered[gap.next].double()
        gram = before.T @ before
        wanted = torch.linalg.solve(gram + 1e-3 * gram.diagonal().mean() * torch.eye(32), before.T @ (after - before))
        torch.testing.assert_close(ghost[f"{gap.after}.change"].double(), wanted, atol=1e-5, rtol=1e-3)
        rotation = hadamard(32)
        ratio = (after @ rotation).abs().sum(0) / (before @ rotation).abs().sum(0)
        torch.testing.assert_close(linear[f"{gap.after}.diagonal"].double(), ratio, atol=1e-5, rtol=1e-4)
        made = changes_of(linear, [g.after for g in gaps_of(plan)], "x")[gap.after]
        torch.testing.assert_close(
            before + before @ made.double(), before @ rotation @ ratio.diag() @ rotation.T, atol=1e-5, rtol=1e-5
        )


def test_padding_is_no_text() -> None:
    whole = model_of("llama")
    rows = [row[: 9 + 3 * number] for number, row in enumerate(rows_of(7))]
    together = [torch.cat(pair) for pair in zip(*(found[0] for found in states_at(whole, [Gap(2, 4)], rows)))]
    alone = [torch.cat([states(whole, row[None], place)[0] for row in rows]) for place in (2, 4)]
    for found, wanted in zip(together, alone):
        torch.testing.assert_close(found, wanted)
    scattered, whole_rows = (LinearPatch().maps(work_on(whole, rows=given))[0] for given in (rows, rows_of(7)))
    assert scattered["1.diagonal"].ne(whole_rows["1.diagonal"]).any()


def test_distilling_trains_the_patch_and_nothing_else() -> None:
    whole = model_of("llama")
    work = work_on(whole)
    weights = copy.deepcopy(work.student.state_dict())
    cut = said(work.student, work.held_out)
    options = LinearPatch(patch_steps=25, patch_lr=3e-3, patch_batch_size=4, patch_top_k=10)
    maps, _ = options.maps(work)
    assert torch.equal(said(work.student, work.held_out), cut), "the student is left without what trained"
    assert all(torch.equal(weights[name], tensor) for name, tensor in work.student.state_dict().items())
    assert set(maps) == {"1.change"}
    batch = Batch.of(list(rows_of(6)), torch.device("cpu"))
    far = {}
    for name, found in (("plain", LinearPatch().maps(work)[0]), ("distilled", maps)):
        student = student_of(whole, PLAN)
        put_into(student, PLAN, found)
        far[name] = divergence(whole, student, batch, 10).item()
    assert far["distilled"] < 0.8 * far["plain"]


def test_too_little_text_and_a_cut_at_the_start_are_said() -> None:
    with pytest.raises(DataError, match=r"width 32, and there are 32 tokens: give at least 64, by --fit-blocks"):
        Ghost().maps(work_on(model_of("llama"), rows=rows_of(1)))
    for method in (Ghost(), LinearPatch()):
        assert isinstance(method, Patching)
        with pytest.raises(UsageError, match="starts at layer 0"):
            method.check_model(None, Plan(LAYERS, (0, 3)))


# --- a recipe with a patch --------------------------------------------------------------------------------------------


@pytest.fixture
def made(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """The folder of a recipe of a tiny Llama with patches behind layers 1 and 4."""
    plan = Plan(8, (2, 5))
    write_recipe(tiny("llama"), plan, tmp_path / "r.yml")
    cut = open_cut(tmp_path / "r.yml")
    width = cut.config["hidden_size"]
    torch.manual_seed(5)
    maps = {"1.change": 0.1 * torch.randn(width, width), "4.diagonal": 1 + 0.5 * torch.rand(width)}
    write_patched(cut, plan, "ghost", maps, tmp_path / "patched")
    return tmp_path / "patched"


def _by_hand(made: Path) -> Any:
    """The cut model with hooks that do what the patch should."""
    model = open_cut(made.parent / "r.yml").load()
    changes = changes_of(load_file(made / "recipe.patch.safetensors"), [1, 4], "x")
    for place, layer in ((1, 1), (3, 4)):
        model.model.layers[place].register_forward_hook(
            lambda module, given, state, change=changes[layer]: state + state @ change.to(state.dtype)
        )
    return model


def test_a_live_model_applies_it(made: Path, tmp_path: Path) -> None:
    recipe = made / "recipe.yml"
    want = logits(_by_hand(made))
    assert not torch.equal(want, logits(open_cut(made.parent / "r.yml").load()))
    assert torch.equal(logits(open_cut(recipe).load()), want) and torch.equal(logits(open_cut(made).load()), want)
    base = open_cut(recipe).base.path
    assert torch.equal(logits(LmpruneLM(str(base), recipe=str(recipe), device="cpu").model), want)
    assert torch.equal(logits(pruned_view(open_cut(base).load(), open_cut(recipe).plan)), want)
    rebase(recipe, tmp_path / "other" / "r.yml")
    assert torch.equal(logits(open_cut(tmp_path / "other" / "r.yml").load()), want)
    other = open_cut(recipe).load(dtype="float32")
    assert logits(other).isfinite().all() and logits(other.to(torch.bfloat16)).isfinite().all()


def test_generation_goes_through_it(made: Path) -> None:
    ids = torch.arange(3, 12)[None]
    live, hand = (
        model.generate(ids, max_new_tokens=8, do_sample=False) for model in (open_cut(made).load(), _by_hand(made))
    )
    assert torch.equal(live, hand)


def test_a_further_cut_keeps_it_or_is_refused(made: Path) -> None:
    cut = open_cut(made)
    further = cut.without(Plan(6, (5,)), "further")
    assert further.plan is not None and further.plan.parts == cut.plan.parts  # type: ignore[union-attr]
    view = pruned_view(cut.load(), Plan(6, (5,)))
    assert torch.equal(logits(further.load()), logits(view))
    chosen = choose(cut, "deepest", drop=3)
    assert not {1, 3} & set(chosen.plan.dropped), "which have a patch behind them"
    with pytest.raises(PlanError, match="layer 4 is dropped, and a ghost patch after 1,4 needs it"):
        cut.without(Plan(6, (3,)), "further")


def test_patched_and_unpatched_cuts_share_what_they_have_in_common(made: Path) -> None:
    cut = open_cut(made)
    assert cut.plan is not None
    whole = open_cut(cut.base.path).load()
    views = Views(whole, {"cut": Plan(8, (2, 5)), "patched": cut.plan})
    starts = {turn.name: turn.start for turn in views.turns}
    assert sorted(starts.values()) == [0, 1], "layer 0 is common, and what leaves layer 1 is not"
    assert views.prove(logits)
    views.begin()
    for turn in views.turns:
        with views.turn(turn) as view:
            found = logits(view)
        assert torch.equal(
            found, logits(cut.load() if turn.name == "patched" else open_cut(made.parent / "r.yml").load())
        )


def test_a_profile_is_of_the_patched_states_streamed_too(made: Path, tmp_path: Path, run: Run) -> None:
    text = ("--data", "demo", "--samples", "4", "--max-length", "32", "--json")
    found = []
    for name, more in (("memory", ()), ("streamed", ("--stream",))):
        code, _, told = run("profile", made, "-o", tmp_path / f"{name}.json", *more, *text)
        assert code == 0, told
        found.append(json.loads((tmp_path / f"{name}.json").read_text())["distances"])
    assert found[0] == found[1]
    run("profile", made.parent / "r.yml", "-o", tmp_path / "cut.json", *text)
    assert json.loads((tmp_path / "cut.json").read_text())["distances"] != found[0]


def test_it_is_timed_with_the_model_it_is_of(made: Path) -> None:
    asked = BenchSettings(prompts="8", batch_sizes="1", tokens=2, warmup=1, runs=1, device="cpu")
    cut, patched = bench([made.parent / "r.yml", made], asked).rows
    assert cut.flops_per_token is not None and patched.flops_per_token is not None
    assert patched.flops_per_token - cut.flops_per_token == 2 * 2 * 64 * 64, "two maps, two operations a number"
    assert patched.parameters - cut.parameters == 2 * 64 * 64 and patched.layers == cut.layers == 6
    assert patched.weight_bytes - cut.weight_bytes == (4 + 2) * 2 * 64 * 64, "in float32, and as the states are"
    assert patched.ideal < cut.ideal == 1.0


def test_as_a_draft_it_speaks_as_patched(made: Path) -> None:
    settings = DraftSettings(samples=4, max_length=32, prompts=0, draft_tokens="1", device="cpu")
    data = DataSettings(data="demo")
    found = draft(made, settings=settings, data=data)
    base = open_cut(open_cut(made).base.path)
    text, _ = texts(base, settings, data)
    wanted, without = (
        agreement(base.load(), model, text) for model in (_by_hand(made), open_cut(made.parent / "r.yml").load())
    )
    assert (found.greedy, found.acceptance) == (wanted.greedy, wanted.acceptance)
    assert without.acceptance != wanted.acceptance


def test_further_cuts_are_compared_as_patched(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compared(model: Path) -> list[float | None]:
        how = ProfileSettings(samples=6, max_length=24, device="cpu", dtype="bfloat16")
        done = compare(model, drop=1, criteria=["angular", "deepest"], settings=how, data=DataSettings(data="demo"))
        return [done.whole, *(row.rise for row in done.rows)]

    found = compared(made)
    by_hand = _by_hand(made)
    monkeypatch.setattr(Cut, "load", lambda self, **how: by_hand)
    assert found == compared(made) and by_hand.config.num_hidden_layers == 6


def test_a_sweep_measures_it(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Tensor] = {}

    def evaluated(self: Any, sweep: Any, point: Any, model: LmpruneLM, arguments: dict[str, Any]) -> None:
        seen[point.name] = logits(model.model)
        assert arguments.get("recipe") is None or torch.equal(
            logits(open_cut(arguments["recipe"]).load(dtype=arguments["dtype"])), seen[point.name]
        )

    monkeypatch.setattr(SweepRun, "_evaluate", evaluated)
    settings = SweepSettings(
        fractions="0.25",
        criteria="deepest",
        recipes=str(made / "recipe.yml"),
        tasks="lmprune_demo",
        device="cpu",
        dtype="bfloat16",
    )
    run = SweepRun(str(open_cut(made).base.path), tmp_path / "sweep", settings, DataSettings(data="demo"))
    run.measure(run.prepare())
    assert set(seen) == {"baseline", "deepest-02", "recipe-02"}
    assert torch.equal(seen["recipe-02"], logits(_by_hand(made)))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("prune", "{recipe}", "{out}"), "--method refit"),
        (("quantize", "{recipe}", "{out}", "--quantization", "int8"), "--method refit"),
        (("export", "{recipe}", "{out}.gguf"), "--method refit"),
        (("verify", "{recipe}", "{recipe}"), "--method refit"),
        (("heal", "{recipe}", "{out}"), "--method refit"),
        (("heal", "{recipe}", "{out}", "--method", "refit"), "--method refit"),
        (("heal", "{recipe}", "{out}", "--method", "ghost"), "has a ghost patch after 1,4 already"),
        (("heal", "{recipe}", "{out}", "--method", "distill", "--keep-adapter"), "a teacher runs"),
        (("heal", "{plain}", "{out}", "--method", "ghost+lora"), "Train that in a call of its own"),
        (("heal", "{plain}", "{out}", "--method", "ghost", "--as-adapter", "4"), "which no LoRA holds"),
        (("heal", "{plain}", "{out}", "--method", "ghost", "--ridge", "-1"), "give 0 or more"),
    ],
)
def test_what_writes_a_checkpoint_refuses_it(words: tuple[str, ...], said: str, made: Path, run: Run) -> None:
    out = made.parent / "out"
    given = {"recipe": made / "recipe.yml", "out": out, "plain": made.parent / "r.yml"}
    code, _, told = run(*(word.format(**given) for word in words))
    assert code in (1, 2) and said in told and len(told.strip().splitlines()) == 1, told
    assert not out.exists()


def test_mergekit_refuses_it(made: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge_methods import get as method

    data = yaml.safe_load((made / "recipe.yml").read_text())
    with pytest.raises(RuntimeError, match="lmprune"):
        method(MergeConfiguration.model_validate(data).merge_method)


def _with(made: Path, maps: dict[str, Tensor] | None = None, **changes: Any) -> None:
    """Write the recipe again, with another file or other data."""
    data = yaml.safe_load((made / "recipe.yml").read_text())
    patch = data["lmprune"]["parts"]["patch"]
    if maps is not None:
        patch |= Beside.of(save(maps), "recipe.patch.safetensors", made).to_data()
    patch |= changes
    (made / "recipe.yml").write_text(yaml.safe_dump(data))


@pytest.mark.parametrize(
    ("maps", "said"),
    [
        ({"1.change": torch.eye(3), "4.diagonal": torch.ones(3)}, "for states of width 3, and this model's have"),
        ({"1.change": torch.eye(64)}, "holds no map for layer 4"),
        ({"1.change": torch.eye(64), "4.change": torch.eye(64), "5.change": torch.eye(64)}, "'5.change' of shape"),
        ({"1.change": torch.eye(64), "4.weight": torch.eye(64)}, "'4.weight' of shape"),
        ({"1.change": torch.ones(64, 32), "4.change": torch.eye(64)}, r"\[64, 32\] is no map"),
        ({"1.change": torch.eye(64) * float("nan"), "4.change": torch.eye(64)}, "holds what is no number"),
        ({"1.change": torch.eye(64, dtype=torch.int64), "4.change": torch.eye(64)}, "holds what is no number"),
        ({"1.diagonal": torch.ones(0), "4.change": torch.eye(64)}, "is no map"),
    ],
)
def test_a_patch_that_does_not_fit_is_refused(maps: dict[str, Tensor], said: str, made: Path) -> None:
    _with(made, maps)
    with pytest.raises(RecipeError, match=said):
        open_cut(made).load()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"after": [2]}, "layer 2 is dropped, and a ghost patch after 2 needs it"),
        ({"after": []}, r"after is \[\]; list layers from 0 to 7"),
        ({"after": [8]}, "list layers from 0 to 7"),
        ({"after": [4, 1]}, "ascending"),
        ({"after": "1"}, "list layers"),
        ({"after": [True]}, "list layers"),
        ({"method": "../x"}, "no name of a healing method"),
        ({"sha256": "0" * 64}, "does not fit its recipe"),
        ({"more": 1}, "unknown key 'more'"),
    ],
    ids=str,
)
def test_wrong_data_are_refused(changes: dict[str, Any], said: str, made: Path) -> None:
    _with(made, **changes)
    with pytest.raises(RecipeError, match=said):
        open_cut(made)


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("profile", "{made}", "-o", "{out}"),
        ("bench", "{made}", "-o", "{out}"),
        ("heal", "{made}", "{out}", "--method", "lora", "--keep-adapter", "--data", "demo"),
    ],
    ids=lambda words: words[0],
)
def test_a_changed_file_is_one_line(words: tuple[str, ...], made: Path, tmp_path: Path, run: Run) -> None:
    given = {"made": made / "recipe.yml", "out": tmp_path / "out.json"}
    file = made / "recipe.patch.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    code, _, told = run(*(word.format(**given) for word in words))
    assert code == 1 and "recipe.patch.safetensors does not fit its recipe: its SHA-256 is" in told
    assert len(told.strip().splitlines()) == 1 and not (tmp_path / "out.json").exists()


def test_heal_writes_a_recipe_with_the_patch_beside_it(tmp_path: Path, run: Run) -> None:
    write_recipe("demo", Plan(12, (2, 3, 7)), tmp_path / "r.yml")
    text = ("--max-length", "64", "--eval-blocks", "4", "--fit-blocks", "16")
    code, _, told = run("heal", tmp_path / "r.yml", tmp_path / "out", "--method", "ghost", "--ridge", "1e-3", *text)
    assert code == 0, told
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "recipe.yml", "recipe.patch.safetensors", "lmprune.json"
    }  # fmt: skip
    cut = open_cut(tmp_path / "out")
    assert cut.plan is not None and isinstance(cut.plan.parts[0], Patch) and cut.plan.parts[0].after == (1, 6)
    told_of = json.loads((tmp_path / "out" / "lmprune.json").read_text())
    assert told_of["healing"]["losses"]["healed"] < told_of["healing"]["losses"]["pruned"]
    assert told_of["healing"]["repair"]["after"] == [1, 6] and told_of["parts"]["patch"]["method"] == "ghost"
    _, shown, _ = run("show", tmp_path / "out")
    assert "a ghost patch after 1,6" in shown and "healed   ghost" in shown and "runs in" not in shown


def test_an_adapter_is_trained_on_the_patched_model(made: Path, tmp_path: Path, run: Run) -> None:
    text = ("--data", "demo", "--max-length", "32", "--eval-blocks", "4", "--steps", "2", "--batch-size", "2")
    code, _, told = run("heal", made, tmp_path / "adapter", "--method", "lora", "--keep-adapter", *text)
    assert code == 0, told
    again = open_cut(tmp_path / "adapter")
    assert again.plan == open_cut(made).plan and again.adapter == tmp_path / "adapter"
    shutil.copytree(made, tmp_path / "moved")
    joined = open_cut(f"{tmp_path / 'moved' / 'recipe.yml'}+{tmp_path / 'adapter'}")
    assert torch.equal(logits(again.load()), logits(joined.load()))
    code, _, told = run("prune", tmp_path / "adapter", tmp_path / "out")
    assert code == 2 and "refit" in told
    other = Cut(again.base, Plan(8, (2, 5)), None, "x", tmp_path / "adapter")
    with pytest.raises(Exception, match="does not fit this model: it was trained on the cut that drops 2"):
        other.load()


def test_it_goes_to_the_hub_with_its_recipe(hub: Any, made: Path, tiny: Callable[..., Path]) -> None:
    push(made / "recipe.yml", "ada/patched", base="org/base")
    assert "recipe.patch.safetensors" in hub.files("ada/patched")
    hub.repositories["org/base"] = type(hub.repositories["ada/patched"])()
    hub.repositories["org/base"].commit({f.name: f.read_bytes() for f in tiny("llama").iterdir() if f.is_file()})
    assert torch.equal(logits(open_cut("ada/patched").load()), logits(open_cut(made).load()))


def test_a_patch_is_pushed_as_weights_are(hub: Any, made: Path) -> None:
    plain = made.parent / "r.yml"
    push(plain, "ada/patched", base="org/base", weights=made)
    assert {"recipe.yml", "recipe.patch.safetensors"} <= set(hub.files("ada/patched"))
    assert b"adds a ghost patch after 1,4" in hub.files("ada/patched")["recipe.yml"]
    assert b"ghost patch" in hub.files("ada/patched")["README.md"]
    push(plain, "ada/patched", base="org/base")
    assert "recipe.patch.safetensors" not in hub.files("ada/patched"), "what a push without it leaves out goes"
    write_recipe(open_cut(plain).base.name, Plan(8, (3,)), made.parent / "s.yml")
    with pytest.raises(RecipeError, match="holds no weights"):
        push(made.parent / "s.yml", "ada/patched", base="org/base", weights=made)


def test_an_adapter_is_pushed_and_opened_on_the_cut_it_is_of(
    hub: Any, made: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    cut, base = open_cut(made), tiny("llama")
    config = LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(cut.load(), config).save_pretrained(tmp_path / "adapter")
    cut.lineage.write(tmp_path / "adapter")
    push(made / "recipe.yml", "ada/adapted", base="org/base", weights=tmp_path / "adapter")
    hub.repositories["org/base"] = type(hub.repositories["ada/adapted"])()
    hub.repositories["org/base"].commit({f.name: f.read_bytes() for f in base.iterdir() if f.is_file()})
    again = open_cut("ada/adapted")
    assert again.adapter is not None and again.plan == cut.plan
    assert torch.equal(logits(again.load()), logits(open_cut(f"{made / 'recipe.yml'}+{tmp_path / 'adapter'}").load()))


def test_training_goes_through_a_patch(made: Path) -> None:
    """Gradients reach the layers before it, after inference has used it in another type."""
    model = open_cut(made).load(dtype="float32")
    with torch.inference_mode():
        model(torch.arange(5)[None])
    model.train()(torch.arange(5)[None]).logits.sum().backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0


def test_copies_of_a_model_share_the_map() -> None:
    model = model_of("llama")
    change = torch.randn(32, 32)
    put_behind(model.model.layers[1], change)
    copied = copy.deepcopy(model)
    assert torch.equal(said(copied, rows_of(1)), said(model, rows_of(1)))
    change.zero_()
    bare = model_of("llama")
    assert all(torch.equal(said(each, rows_of(1)), said(bare, rows_of(1))) for each in (model, copied))
