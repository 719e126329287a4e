"""Cuts are judged as a repair leaves them, where that is asked for."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmprune.choosing import ModelEvidence, check, choose
from lmprune.choosing import repairing as repairs
from lmprune.comparing import compare
from lmprune.criteria.settings import ChoiceSettings
from lmprune.cuts.plan import Plan
from lmprune.errors import DataError, UsageError
from lmprune.forward.loss import losses
from lmprune.forward.views import pruned_view
from lmprune.healing.methods.refit import Refit
from lmprune.healing.methods.scalar import Scalar
from lmprune.models.cut import open_cut
from lmprune.profiling import ProfileSettings
from lmprune.text.sources import DataSettings

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS, DATA = ProfileSettings(samples=8, max_length=24, dtype="float32"), DataSettings(data="demo")
GONE = Plan(8, (3, 4))


def evidence_of(folder: Path, after: str, **more: Any) -> ModelEvidence:
    return ModelEvidence(open_cut(folder), SETTINGS, DATA, how=ChoiceSettings(after=after, exact=True), **more)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A repair that takes no time: what is left is as it was, but for one number. The cuts it was asked for."""
    made: list[tuple[int, ...]] = []

    def repaired(self: Any, whole: Any, plan: Plan) -> Any:
        import copy

        made.append(plan.dropped)
        model = copy.deepcopy(pruned_view(whole, plan))
        model.lm_head.weight.data *= 0.5
        return model

    monkeypatch.setattr(repairs.Repairer, "repaired", repaired)
    return made


@pytest.mark.parametrize(
    "method", ["scalar", *(pytest.param(name, marks=pytest.mark.slow) for name in ("refit", "ghost"))]
)
def test_a_repaired_cut_has_the_repaired_models_loss(tiny: Callable[..., Path], method: str) -> None:
    evidence = evidence_of(tiny("llama"), method)
    found = evidence.repaired(GONE).judged([GONE, Plan(8, (3, 4, 6))])
    lab = evidence._lab
    repaired = repairs.Repairer(method, evidence.cut, lab.texts.rest).repaired(lab.model, GONE)
    same = losses(repaired, [Plan(6), Plan(6, (4,))], lab.texts.judged_on)
    assert np.array_equal(found.values, same.values)
    assert found.mean()[0] != evidence.judged([GONE]).mean()[0]
    assert evidence.repaired(Plan(8)) is evidence and evidence.repaired(GONE).after is None


def test_what_is_repaired_on_is_not_judged_on(tiny: Callable[..., Path]) -> None:
    long, how = ProfileSettings(samples=8, max_length=96), ChoiceSettings(after="scalar")
    texts = ModelEvidence(open_cut(tiny("llama")), long, DATA, how=how)._lab.texts
    rest = {row.tobytes() for row in texts.rest.rows}
    apart = {row.tobytes() for half in (texts.judged_on, texts.chosen_on) for row in half.rows if len(row) > 40}
    assert texts.rest.count >= 64 * 256 and apart and not rest & apart


def test_cuts_are_compared_on_less_text_than_the_chosen_one_is_repaired_on(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert repairs.tokens_wanted(Refit) == repairs.FIT_BLOCKS * 256 * 5 // 4 < Refit().fit_blocks * 256
    assert repairs.tokens_wanted(Refit(fit_blocks=8)) == 8 * 256 * 5 // 4
    monkeypatch.setattr(repairs, "FIT_BLOCKS", 4)
    lab = evidence_of(tiny("llama"), "scalar")._lab
    fit, held = repairs.Repairer("scalar", lab.cut, lab.texts.rest)._blocks(Scalar())
    assert (fit.shape[0] + held.shape[0]) * fit.shape[1] == repairs.tokens_wanted(Scalar)


def test_what_the_whole_model_says_stays_the_measure(tiny: Callable[..., Path], quick: list[Any]) -> None:
    """Divergence is from the whole model, not from the repaired one."""
    evidence = evidence_of(tiny("llama"), "scalar").by("kl")
    (whole,), (after,) = evidence.judged([Plan(8)]).mean(), evidence.repaired(GONE).judged([GONE]).mean()
    assert whole == pytest.approx(0, abs=1e-6) and after > 1e-3


def test_a_repaired_model_is_let_go_of_and_what_it_took_is_counted(
    tiny: Callable[..., Path], quick: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six of them, as large as the model each, would else wait for the end of a search."""
    made, repair = list[Any](), repairs.Repairer.repaired
    monkeypatch.setattr(repairs.Repairer, "repaired", lambda *args: _noted(repair(*args), made))
    evidence = evidence_of(tiny("llama"), "scalar")
    evidence.judged([Plan(8)])
    asked, passes = evidence.losses_asked, evidence.passes
    evidence.repaired(GONE).judged([GONE])
    assert len(quick) == 1 and [one() for one in made] == [None]
    assert evidence.losses_asked == asked + 1 and evidence.passes == pytest.approx(passes * (1 + 6 / 8))


def _noted(model: Any, made: list[Any]) -> Any:
    made.append(weakref.ref(model))
    return model


@pytest.mark.slow
def test_greedy_and_best_repair_as_often_as_they_say(tiny: Callable[..., Path], quick: list[Any]) -> None:
    from lmprune.criteria import best, greedy

    for name, module in (("greedy", greedy), ("best", best)):
        quick.clear()
        evidence = evidence_of(tiny("llama"), "refit")
        made = choose(evidence.cut, name, drop=2, evidence=evidence)
        assert len(quick) == module.repairs(2) and made.details["after"] == "refit"
        cost = check(made.plan, evidence)
        assert cost.repaired is not None and f"after refit ({cost.repaired[1] - cost.whole:+.4f})" in cost.describe()
        assert len(quick) == module.repairs(2) + (name == "greedy")  # best has repaired that cut already


def test_a_killed_search_repairs_nothing_twice(tiny: Callable[..., Path], quick: list[Any], tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        evidence = evidence_of(tiny("llama"), "refit", journal_file=tmp_path / "j")
        found.append(choose(evidence.cut, "best", drop=1, evidence=evidence))
        evidence.close()
    assert found[0] == found[1] and len(quick) == 6


def test_a_comparison_says_what_is_left_after_the_repair(tiny: Callable[..., Path], quick: list[Any]) -> None:
    how = ChoiceSettings(after="scalar")
    done = compare(
        tiny("llama"), drop=1, criteria=["deepest", "greedy", "finercut"], settings=SETTINGS, data=DATA, how=how
    )
    head, rows = done.table()
    column = head.index("after scalar")
    assert {row[0]: bool(row[column]) for row in rows} == {"deepest": True, "greedy": True, "finercut": False}
    assert done.to_data()["after"] == "scalar" and all("repaired" in row for row in done.to_data()["rows"])


@pytest.mark.parametrize(
    ("name", "how", "more", "said"),
    [
        ("best", {"after": "lora"}, {}, "--after lora: it trains.*Give refit"),
        ("best", {"after": "refitt"}, {}, "--method 'refitt' does not exist.*refit"),
        (
            "angular",
            {"after": "refit"},
            {},
            "--after refit: angular judges no cut after a repair; these do: greedy, best",
        ),
        ("greedy", {"after": "refit"}, {"stream": True}, "works on the weights as they are"),
        ("greedy", {"after": "refit"}, {"quantization": "nf4"}, "works on the weights as they are"),
    ],
)
def test_what_cannot_be_judged_so_is_one_line(
    tiny: Callable[..., Path], name: str, how: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    settings = ProfileSettings(samples=8, max_length=24, **more)
    with pytest.raises(UsageError, match=said):
        choose(tiny("llama"), name, drop=1, settings=settings, data=DATA, how=ChoiceSettings(**how))


def test_too_little_text_to_repair_on_is_one_line(tiny: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("\n\n".join(f"one line, number {number}" for number in range(40)))
    evidence = ModelEvidence(
        open_cut(tiny("llama")),
        SETTINGS,
        DataSettings(data=str(tmp_path / "few.txt")),
        how=ChoiceSettings(after="refit"),
    )
    with pytest.raises(DataError, match=r"--after refit: .*Give more --samples, or more text"):
        evidence.repaired(GONE).judged([GONE])
