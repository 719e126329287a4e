"""The search under a budget: on numbers made up for it, and on a tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from lmprune.budgeting.budget import Budget, BudgetSettings, Shape, usual_multiple
from lmprune.budgeting.run import Found, choose_by_budget, draw_frontier
from lmprune.budgeting.search import Search
from lmprune.choosing import ModelEvidence
from lmprune.criteria.settings import ChoiceSettings
from lmprune.cuts.width import Width
from lmprune.errors import UsageError
from lmprune.forward import machine
from lmprune.models import in_files
from lmprune.models.cut import open_cut
from lmprune.profiling.settings import ProfileSettings
from lmprune.text.sources import DataSettings

WHOLE = Shape((), 64, 32, 4)


@dataclass
class Made:
    """A model whose costs are a sum of what each part costs, `Lab` of the search."""

    prices: dict[str, float]
    depth: int = 8
    heads: int = 1
    whole: Shape = WHOLE
    measured: list[Shape] = field(default_factory=list)
    narrowest: int = 0

    def amount(self, shape: Shape) -> float:
        layers = self.depth - len(shape.dropped)
        return layers * (3 * shape.ffn * shape.hidden + shape.hidden * shape.hidden * (2 + 2 * shape.groups / 4))

    def cost(self, shape: Shape) -> float:
        self.measured.append(shape)
        apart = {
            "depth": sum(1 + 0.1 * layer for layer in shape.dropped) + len(shape.dropped) ** 2 * 0.1,
            "ffn": (64 / shape.ffn) ** 2 - 1,
            "hidden": (32 / shape.hidden) ** 2 - 1,
            "groups": (4 / shape.groups) ** 2 - 1,
        }
        return 1 + sum(self.prices[kind] * cost for kind, cost in apart.items())

    def layers(self, shape: Shape) -> Sequence[int]:
        return [layer for layer in range(self.depth) if layer not in shape.dropped]

    def allows(self, shape: Shape) -> bool:
        return shape.hidden >= self.narrowest


DEAR = {"depth": 9.0, "ffn": 9.0, "hidden": 9.0, "groups": 9.0}
KINDS = ("depth", "ffn", "slice", "groups")


@pytest.mark.parametrize("cheap", ["depth", "ffn", "hidden"])
def test_what_is_cheap_goes(cheap: str) -> None:
    lab = Made(DEAR | {cheap: 0.001})
    most = 0.7 * lab.amount(WHOLE)
    best = Search(lab, KINDS, most, 2).run().best
    assert best is not None and lab.amount(best.shape) <= most
    kept = {"depth": best.shape.dropped == (), "ffn": best.shape.ffn == 64, "hidden": best.shape.hidden == 32}
    assert [kind for kind, whole in kept.items() if not whole] == [cheap] and best.shape.groups == 4
    if cheap == "depth":
        assert best.shape.dropped == tuple(range(len(best.shape.dropped)))  # the cheapest layers


def test_a_mix_is_found_that_no_kind_alone_reaches() -> None:
    lab = Made({"depth": 0.3, "ffn": 0.3, "hidden": 1.0, "groups": 9.0})
    most = 0.5 * lab.amount(WHOLE)
    best = Search(lab, KINDS, most, 2).run().best
    assert best is not None and lab.amount(best.shape) <= most
    alone = [Search(lab, (kind,), most, 2).run().best for kind in ("depth", "ffn", "slice")]
    assert all(one is not None and best.cost < one.cost for one in alone)
    every = [
        shape
        for dropped in range(5)
        for ffn in range(16, 65, 2)
        for hidden in range(16, 33, 2)
        if lab.amount(shape := Shape(tuple(range(dropped)), ffn, hidden, 4)) <= most
    ]
    # Near the best there is, at a share of the trials that trying all takes.
    whole, tried = lab.cost(WHOLE), len(set(lab.measured))
    least = min(lab.cost(shape) for shape in every)
    assert best.cost - whole <= 1.1 * (least - whole) and tried < len(every) / 4


def test_sizes_are_multiples_and_trials_that_are_not_worth_it_are_left_out() -> None:
    lab = Made(DEAR | {"hidden": 0.001, "ffn": 0.01}, narrowest=28)
    best = Search(lab, KINDS, 0.6 * lab.amount(WHOLE), 4).run().best
    assert best is not None and best.shape.hidden == 28 and best.shape.ffn % 4 == 0 and best.shape.ffn < 64
    assert all(shape.hidden >= 28 for shape in lab.measured)


def test_each_step_is_smaller_and_the_search_is_the_same_each_time() -> None:
    lab = Made(DEAR)
    ways = [Search(lab, KINDS, 0.5 * lab.amount(WHOLE), 2).run() for _ in range(2)]
    amounts = [step.amount for step in ways[0].steps]
    assert amounts == sorted(amounts, reverse=True) and ways[0].steps == ways[1].steps
    assert ways[0].steps[0].kind == "whole" and ways[0].best == ways[1].best


def test_fewer_steps_take_fewer_trials() -> None:
    costs, trials = [], []
    for steps in (6, 2):
        lab = Made({"depth": 0.3, "ffn": 0.3, "hidden": 1.0, "groups": 9.0})
        way = Search(lab, KINDS, 0.5 * lab.amount(WHOLE), 2, steps=steps).run()
        assert way.best is not None and lab.amount(way.best.shape) <= 0.5 * lab.amount(WHOLE)
        costs.append(way.best.cost)
        trials.append(len(set(lab.measured)))
    assert trials[1] < trials[0] and costs[1] < 1.5 * costs[0]


def test_a_budget_out_of_reach_is_refused_before_anything_is_measured() -> None:
    lab = Made(DEAR)
    with pytest.raises(UsageError, match="cannot be reached with ffn: at the least"):
        Search(lab, ("ffn",), 0.1 * lab.amount(WHOLE), 2).run()
    assert not lab.measured


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "not none"),
        ({"params": 0.5, "size": "4GB"}, "not params and size"),
        ({"params": 1.0}, "between 0 and 1"),
        ({"size": "much"}, "--size 'much' is no size"),
        ({"size": "0GB"}, "is no size"),
        ({"speed": "0.9x"}, "--speed '0.9x'"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        Budget.of(BudgetSettings(**settings))  # type: ignore[arg-type]


def test_budgets_are_read() -> None:
    assert Budget.of(BudgetSettings(size="1.5GB")) == Budget("size", 1.5e9)
    assert Budget.of(BudgetSettings(size="600 MB")).value == 6e8
    assert Budget.of(BudgetSettings(speed="1.3x")) == Budget("speed", 1.3)
    assert BudgetSettings(kinds="ffn, depth").named == ("ffn", "depth")
    with pytest.raises(UsageError, match="'wide' is nothing to cut"):
        _ = BudgetSettings(kinds="depth,wide").named


def test_multiples_follow_the_size() -> None:
    assert [usual_multiple(Shape((), ffn, hidden, 4)) for ffn, hidden in ((320, 128), (2048, 640), (11008, 4096))] == [
        2, 16, 64,
    ]  # fmt: skip


# --- a tiny model ---------------------------------------------------------------------------------------------------


def evidence_of(
    folder: Path,
    journal: Path | None = None,
    *,
    length: int = 48,
    pack: bool = False,
    stream: bool | None = None,
    at_speed: bool = False,
) -> ModelEvidence:
    settings = ProfileSettings(samples=24, max_length=length, device="cpu", stream=stream)
    how = ChoiceSettings(objective="loss", loss_samples=8)
    made = ModelEvidence(
        open_cut(str(folder)), settings, DataSettings(data="demo", pack=pack), how=how, journal_file=journal
    )
    return made.in_float32(at_speed=at_speed)


@pytest.fixture(scope="module")
def small(tiny: Callable[..., Path]) -> Path:
    return tiny("llama", num_hidden_layers=3, hidden_size=32, intermediate_size=64, num_key_value_heads=4, head_dim=8)


ASKED = BudgetSettings(params=0.8, kinds="depth,ffn", multiple=16, fit_tokens=300)


@pytest.fixture(scope="module")
def found(small: Path) -> Found:
    return choose_by_budget(ASKED, evidence_of(small))


def test_with_weights_in_files_the_same_is_found(
    found: Found, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_files, "_LEAST", 1)
    monkeypatch.setattr(in_files, "_in_memory", lambda folder: False)
    evidence = evidence_of(small, tmp_path / "losses.partial", stream=True)
    assert all(parameter.untyped_storage().filename for parameter in evidence.model.parameters())
    again = choose_by_budget(ASKED, evidence)
    assert again.choice.plan == found.choice.plan
    for mine, theirs in zip(again.frontier, found.frontier, strict=True):
        assert mine == replace(theirs, speed=None)
    draw_frontier(found, tmp_path / "frontier.svg")
    assert "times as fast" in (tmp_path / "frontier.svg").read_text()
    draw_frontier(again, tmp_path / "frontier.svg")
    assert "times as fast" not in (tmp_path / "frontier.svg").read_text()
    evidence.close(done=True)
    assert [path.name for path in tmp_path.iterdir()] == ["frontier.svg"]
    with pytest.raises(UsageError, match=r"--speed: the weights wait in files"):
        choose_by_budget(BudgetSettings(speed="1.2x"), evidence_of(small, stream=True))


@pytest.mark.slow
def test_a_smaller_hidden_size_is_found_in_files_too(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the default objective, for which the model writes answers, with settings of its makers."""
    monkeypatch.setattr(in_files, "_LEAST", 1)
    monkeypatch.setattr(in_files, "_in_memory", lambda folder: False)
    shutil.copytree(small, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"repetition_penalty": 5.0}')
    asked, found = replace(ASKED, kinds="ffn,slice"), []
    for stream in (False, True):
        evidence = evidence_of(tmp_path / "model", tmp_path / f"{stream}.partial", stream=stream).by("loss+self")
        evidence.how = replace(evidence.how, objective=None)
        found.append(choose_by_budget(asked, evidence))
    assert found[0].choice.plan == found[1].choice.plan
    assert [replace(point, speed=None) for point in found[0].frontier] == list(found[1].frontier)


def test_weights_wait_in_files_where_two_models_have_no_room(
    small: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weights = machine.weights_bytes(open_cut(str(small)), 4)
    monkeypatch.setattr(machine, "free_memory", lambda device="cpu": int(1.5 * weights))
    with caplog.at_level("INFO", logger="lmprune"):
        assert evidence_of(small).in_files
    assert "their weights wait in files (--stream)" in caplog.text
    assert not evidence_of(small, at_speed=True).in_files
    assert not evidence_of(small, stream=False).in_files
    monkeypatch.setattr(machine, "free_memory", lambda device="cpu": 3 * weights)
    assert not evidence_of(small).in_files
    monkeypatch.setattr(machine, "pick_device", lambda name="auto", local_rank=0: torch.device("cuda", 0))
    with pytest.raises(UsageError, match=r"--stream: .* and not on cuda:0. Give --device cpu"):
        evidence_of(small, stream=True)


def test_what_is_found_keeps_to_the_budget_and_says_what_each_part_gave(found: Found, small: Path) -> None:
    whole, cut = open_cut(str(small)), open_cut(str(small)).without(found.choice.plan, "cut")
    sizes = [sum(p.numel() for name, p in each.empty().named_parameters() if "layers" in name) for each in (whole, cut)]
    assert sizes[1] <= 0.8 * sizes[0] + 32  # the final norm counts as well
    last = found.frontier[-1]
    assert found.frontier[0].shape == "the whole model" and found.frontier[0].repaired == 0
    assert last.parameters == pytest.approx(sizes[1] / sizes[0], abs=0.01) and last.parameters < 0.801
    saved = sum(each for each, _ in found.gave.values())
    assert found.gave and saved == pytest.approx(1 - last.parameters, abs=0.15)
    details = found.choice.to_data()
    assert details["budget"] == {"params": 0.8, "multiple": 16, "with": ["depth", "ffn"]} and details["trials"] > 1
    # Each trial takes a pass of both models over its 300 tokens and more, of which 8 samples of 48 are chosen on.
    assert details["passes"] > details["trials"] * 300 / (8 * 48)


def test_a_share_of_the_layers_is_so_many_of_them(small: Path) -> None:
    found = choose_by_budget(BudgetSettings(params=2 / 3, kinds="depth", fit_tokens=300), evidence_of(small))
    assert len(found.choice.plan.dropped) == 1  # of 3, though the last norm stays


def test_the_frontier_is_drawn(found: Found, tmp_path: Path) -> None:
    draw_frontier(found, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_search_goes_on(found: Found, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmprune.budgeting import lab

    journal, trials = tmp_path / "losses.partial", []
    whole = lab.refit

    def counted(*args: Any, **how: Any) -> Any:
        trials.append(args[2])
        if len(trials) == 2:
            raise KeyboardInterrupt
        return whole(*args, **how)

    monkeypatch.setattr(lab, "refit", counted)
    evidence = evidence_of(small, journal)
    with pytest.raises(KeyboardInterrupt):
        choose_by_budget(ASKED, evidence)
    evidence.close()
    again = choose_by_budget(ASKED, evidence_of(small, journal))
    assert again.choice.plan == found.choice.plan and again.frontier[-1].repaired == found.frontier[-1].repaired
    assert again.choice.details["trials"] == found.choice.details["trials"]
    assert len(trials) == found.choice.details["trials"] + 1  # one is not made again, and one was in the making


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"params": 0.5, "multiple": 64}, "--multiple 64: this model has 64 neurons"),
        ({"size": "20KB"}, r"the embeddings alone take"),
        ({"size": "9MB"}, r"--size 9.0 MB: the whole model takes \d+.\d kB already. Ask for less"),
        ({"size": "1KB"}, r"--size 1.0 kB: the embeddings alone take \d+.\d kB. Allow more"),
        ({"params": 0.5, "multiple": 0}, "--multiple 0: give a number from 1"),
        ({"params": 0.5, "steps": 0}, "--steps 0: give a number from 1"),
        ({"params": 0.5, "fit_tokens": -1}, "--fit-tokens -1: give a number from 1"),
        ({"params": 0.01, "kinds": "ffn"}, "cannot be reached with ffn"),
        ({"params": 0.5, "neurons": "groups"}, "--neurons groups: it orders groups"),
    ],
)
def test_a_budget_that_does_not_fit_the_model_is_refused(small: Path, asked: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        choose_by_budget(BudgetSettings(**asked), evidence_of(small))


def test_a_hidden_size_that_cannot_be_cut_is_refused_by_name_and_left_out_otherwise(tiny: Callable[..., Path]) -> None:
    folder = tiny("olmo2", num_hidden_layers=4, hidden_size=32, intermediate_size=64)
    with pytest.raises(UsageError, match="--with slice: olmo2: its hidden size cannot be cut"):
        choose_by_budget(BudgetSettings(params=0.7, kinds="slice"), evidence_of(folder))


def test_few_tokens_are_told(small: Path) -> None:
    found = choose_by_budget(
        replace(ASKED, fit_tokens=30, params=0.9, kinds="ffn"), evidence_of(small, length=20, pack=True)
    )
    assert any("tokens to fit on for 64 neurons: the ridge carries it" in note for note in found.notes)


MOE: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 64, "num_local_experts": 4},
    "qwen3_moe": {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("kind", [*MOE])
def test_experts_lose_neurons_of_their_own_all_the_way(tiny: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """From the search to a stock checkpoint, which is the live cut; neurons differ from expert to expert."""
    import torch

    import lmprune
    from lmprune.choosing import write_recipe
    from lmprune.models.width import tensors_of

    folder = tiny(kind, num_hidden_layers=3, hidden_size=32, **MOE[kind])
    asked = replace(ASKED, params=0.8, multiple=None, kinds="ffn")
    found = choose_by_budget(asked, evidence_of(folder))
    plan = found.choice.plan
    (part,) = plan.parts
    assert isinstance(part, Width) and part.ffn is not None and part.ffn % 8 == 0 and part.ffn < 64
    rows = tensors_of(part.beside)["neurons.1"]
    assert rows.shape == (4, part.ffn) and not rows.eq(rows[0]).all()
    write_recipe(open_cut(str(folder)), plan, tmp_path / "cut.yml")
    lmprune.prune(tmp_path / "cut.yml", tmp_path / "out")
    live, written = (open_cut(str(tmp_path / name)).load(dtype="float32") for name in ("cut.yml", "out"))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(written(input_ids=ids).logits, live(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert written.model.layers[0].mlp.experts.down_proj.shape == (4, 32, part.ffn)
    sizes = [open_cut(str(each)).empty().model.layers.parameters() for each in (folder, tmp_path / "out")]
    whole, narrow = (sum(parameter.numel() for parameter in each) for each in sizes)
    assert found.frontier[-1].parameters == pytest.approx(narrow / whole, abs=0.002) and narrow <= 0.8 * whole
    with pytest.raises(UsageError, match=r"--multiple 12: experts are multiplied in groups.* Give a multiple of 8"):
        choose_by_budget(replace(asked, multiple=12), evidence_of(folder))


@pytest.mark.slow
def test_a_narrower_demo_is_refitted_into_a_stock_checkpoint(tmp_path: Path) -> None:
    import numpy as np
    import torch

    from lmprune.choosing import write_recipe
    from lmprune.cuts.plan import Plan
    from lmprune.forward.batches import Batch
    from lmprune.healing import HealSettings, heal
    from lmprune.models.width import width_of
    from lmprune.narrowing import WIDTHS
    from lmprune.narrowing.orders import neuron_orders

    cut = open_cut("demo")
    rows = [row for row in cut.tokenizer()(["Ann has 3 apples and 4 pears."] * 4)["input_ids"]]
    batch = Batch.of([np.asarray(row, dtype=np.int32) for row in rows], torch.device("cpu"))
    orders = neuron_orders(cut.load(dtype="float32"), [batch], WIDTHS["magnitude"])
    tensors = {each.name: each.kept(Fraction(288, 320)) for each in orders}
    write_recipe(cut, Plan(12, (), (width_of(tensors, ffn=288),)), tmp_path / "cut.yml")
    done = heal(tmp_path / "cut.yml", tmp_path / "out", HealSettings(method="refit", fit_blocks=10, eval_blocks=8))
    assert done.healed < done.pruned
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] == 288 and config["num_hidden_layers"] == 12
