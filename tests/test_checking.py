"""What a cut costs is always said, and a price can be asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmprune.choosing import ModelEvidence, check, choose
from lmprune.choosing.checking import within_budget
from lmprune.criteria import CRITERIA
from lmprune.criteria.settings import ChoiceSettings
from lmprune.cuts.plan import Plan
from lmprune.errors import PlanError, UsageError
from lmprune.models.cut import open_cut
from lmprune.profiling import ProfileSettings

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = ProfileSettings(samples=24, max_length=64)


@pytest.fixture(scope="module")
def evidence() -> ModelEvidence:
    return ModelEvidence(open_cut("demo"), SETTINGS)


def test_the_cost_is_that_of_unseen_text_and_a_much_better_cut_is_named(evidence: ModelEvidence) -> None:
    plan = Plan(12, (2, 3, 4))
    found = check(plan, evidence, alternative=True)
    whole, cut = evidence.judged([Plan(12), plan]).mean()
    assert (found.whole, found.cut, found.samples) == (whole, cut, 12)
    assert found.better is not None and "one-shot drops" in found.better[0] and found.better[1] < cut - 0.05
    assert check(Plan(12, (7,)), evidence, alternative=True).better is None, "there is no much better one"
    assert check(Plan(12), evidence, alternative=True).cut == whole


@pytest.mark.slow
def test_a_budget_gives_the_most_layers_within_it(evidence: ModelEvidence) -> None:
    greedy = CRITERIA["greedy"]
    made = within_budget(0.15, evidence, lambda count: greedy.choose(count, evidence))
    rises = made.details["rises"]
    count = len(made.plan.dropped)
    assert rises[str(count)] <= 0.15 < rises[str(count + 1)] and len(rises) == count + 1
    with pytest.raises(PlanError, match=r"--max-loss 1e-05: one layer costs 0\.0\d+ nats a token already"):
        within_budget(1e-5, evidence, lambda count: greedy.choose(count, evidence))


def test_protection_ends_a_budget() -> None:
    few = ModelEvidence(open_cut("demo"), SETTINGS, protect=[layer for layer in range(12) if layer not in (4, 7)])
    made = within_budget(9.0, few, lambda count: CRITERIA["one-shot"].choose(count, few))
    assert made.plan.dropped == (4, 7)


def test_every_layer_below_a_limit_goes(evidence: ModelEvidence) -> None:
    limited = evidence.by("loss")
    limited.how = ChoiceSettings(max_increase=0.06)
    made = choose(evidence.cut, "one-shot", evidence=limited)
    costs = {int(layer): value for layer, value in made.details["costs"].items()}
    assert made.plan.dropped == tuple(layer for layer, value in costs.items() if value < 0.06)
    assert made.details["critical"] == [0] and "critical: 0" in made.reason
    limited.how = ChoiceSettings(max_increase=1e-9)
    with pytest.raises(PlanError, match="no layer costs less"):
        choose(evidence.cut, "one-shot", evidence=limited)


@pytest.mark.parametrize(
    ("how", "more", "said"),
    [
        (ChoiceSettings(max_increase=0.1), {"criterion": "greedy"}, "--max-increase goes with --criterion one-shot"),
        (ChoiceSettings(max_loss=0.1), {"drop": 2}, "give one of drop, fraction, max_loss and max_increase"),
    ],
)
def test_limits_that_do_not_go_together(how: ChoiceSettings, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        choose("demo", **{"criterion": "one-shot", **more}, how=how)
    with pytest.raises(UsageError, match="--max-loss -1: give nats a token above 0"):
        ChoiceSettings(max_loss=-1)


@pytest.mark.slow
def test_the_command_says_and_records_the_cost(run: Callable[..., Any], tmp_path: Path) -> None:
    words = ("--samples", "24", "--max-length", "64", "--drop", "3")
    done = run("lmprune", "recipe", "demo", "-o", "r.yml", *words, "--json")
    said = json.loads(done.stdout)["choice"]["check"]
    assert said["cut"] > said["whole"] + 0.3 and "check: {whole:" in (tmp_path / "r.yml").read_text()
    (tmp_path / "nothing.txt").write_text("\n")
    done = run("lmprune", "recipe", "r.profile.json", "-o", "r.yml", "--drop", "3", "--data", "nothing.txt")
    assert "what the cut costs is not measured: nothing.txt holds no text" in done.stderr
    assert "check" not in (tmp_path / "r.yml").read_text()
    assert sorted(file.name for file in tmp_path.iterdir() if "partial" in file.name) == []
