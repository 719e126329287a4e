"""What each criterion promises, on evidence whose truth is known: no model runs here."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lmprune.criteria import CRITERIA, OWN
from lmprune.cuts.plan import Plan
from lmprune.errors import PlanError, UsageError

BY_LOSS = ("one-shot", "greedy", "segment", "oracle", "best", "evolve")


def table(costs: Sequence[float], answers: Sequence[float] = (), error: float = 0.0) -> Any:
    """The losses of some plans on one sample; ``error`` is that of each difference."""
    values = np.array(costs)[:, None]
    return SimpleNamespace(
        values=values,
        tokens=np.array([1]),
        mean=lambda: values[:, 0],
        errors=lambda than: np.full(len(costs), error),
        parts={"answers": table(answers)} if len(answers) else {},
    )


class Known:
    """Evidence of a model whose loss is any function of the layers that are gone."""

    def __init__(self, layers: int, loss: Callable[[frozenset[int]], float], protected: Sequence[int] = ()) -> None:
        self.layers, self.loss, self.protected, self.seed = layers, loss, frozenset(protected), 0
        self.asked: list[tuple[int, ...]] = []
        self.objective, self.judging, self.after = "loss", "loss", None

    def repaired(self, plan: Plan) -> Known:
        return self

    def losses(self, plans: Sequence[Plan]) -> Any:
        self.asked += [plan.dropped for plan in plans]
        return table([self.loss_of(plan) for plan in plans])

    def loss_of(self, plan: Plan) -> float:
        """An attention or an MLP alone is worth half its layer."""
        gone = frozenset(plan.dropped)
        half = [layer for part in plan.parts for layer in (*part.attention, *part.mlp)]  # type: ignore[attr-defined]
        return self.loss(gone) + sum(self.loss(gone | {layer}) - self.loss(gone) for layer in half) / 2

    judged = losses

    def judged_repaired(self, plans: Sequence[Plan]) -> Any:
        return table([self.repaired(plan).judged([plan]).mean()[0] for plan in plans])

    def ranked(self, plans: Sequence[Plan]) -> Any:
        return self.losses(plans).mean()

    def profile(self, plan: Plan | None = None) -> Any:
        kept = plan.kept if plan else tuple(range(self.layers))
        cost = [self.loss(frozenset({layer})) - self.loss(frozenset()) for layer in kept]
        return SimpleNamespace(
            distance=lambda start, n: sum(cost[start : start + n]),
            interval=lambda start, n: (0.0, 1.0),
            certainty=lambda n: SimpleNamespace(describe=lambda: "sure", shares={0: 1.0}),
            block_influence=np.array(cost),
            **dict.fromkeys(("token", "samples", "source", "data_hash", "seed")),
        )

    def weights(self) -> Any:
        for layer in range(self.layers):
            yield layer, "w", np.full((2, 2), self.loss(frozenset({layer})), np.float32)

    def gradients(self) -> Any:
        for layer, name, value in self.weights():
            yield layer, name, value, np.ones_like(value)


def additive(costs: Sequence[float]) -> Callable[[frozenset[int]], float]:
    return lambda gone: 1.0 + sum(costs[layer] for layer in gone)


def twins(gone: frozenset[int]) -> float:
    """Layers 2 and 5 do the same: either may go, both must not. Each other layer costs a little."""
    return 1.0 + (9.0 if {2, 5} <= gone else 0.0) + 0.1 * len(gone - {2, 5})


@pytest.mark.parametrize("name", [name for name in OWN if name not in ("deepest", "random")])
def test_where_layers_do_not_interact_the_cheap_ones_go(name: str) -> None:
    costs = [5.0, 4.0, 3.0, 0.2, 0.1, 0.3, 4.0, 5.0]
    assert CRITERIA[name].choose(2, Known(8, additive(costs))).plan.dropped == (3, 4)


def test_layers_that_hide_each_other_are_told_apart_by_greedy_and_not_by_one_shot() -> None:
    assert CRITERIA["one-shot"].choose(2, Known(8, twins)).plan.dropped == (2, 5)
    for name in ("greedy", "oracle", "best"):
        assert CRITERIA[name].choose(2, Known(8, twins)).plan.dropped != (2, 5), name


def test_the_oracle_is_never_worse_and_best_is_as_good_as_its_proposals() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        table = {gone: float(rng.random()) for n in range(4) for gone in map(frozenset, combinations(range(7), n))}
        chosen = {name: CRITERIA[name].choose(3, Known(7, table.__getitem__)).plan.dropped for name in BY_LOSS}
        found = {name: table[frozenset(dropped)] for name, dropped in chosen.items()}
        assert found["oracle"] == min(found.values())
        assert found["best"] <= min(found["greedy"], found["segment"], found["one-shot"])


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("protected", [(0, 1, 7), (3, 4), ()])
def test_protected_layers_stay(name: str, protected: tuple[int, ...]) -> None:
    known = Known(8, additive([1.0] * 8), protected)
    for count in (1, 2):
        plan = CRITERIA[name].choose(count, known).plan
        assert len(plan.dropped) == count and not set(plan.dropped) & set(protected)


@pytest.mark.parametrize("name", OWN)
def test_protection_that_leaves_too_few_is_one_line(name: str) -> None:
    with pytest.raises(PlanError, match="layers"):
        CRITERIA[name].choose(4, Known(6, additive([1.0] * 6), (0, 2, 4)))


@pytest.mark.parametrize("name", ["taylor", "magnitude"])
def test_the_papers_protected_layers_are_a_default(name: str) -> None:
    loss = additive([0.1, 5.0, 5.0, 5.0, 1.0, 2.0, 5.0, 5.0, 5.0, 5.0, 0.2, 0.3])
    assert CRITERIA[name].choose(2, Known(12, loss)).plan.dropped == (4, 5)
    assert CRITERIA[name].choose(2, Known(12, loss, (11,))).plan.dropped == (0, 10)


def test_the_oracle_says_how_many_passes_it_would_take() -> None:
    with pytest.raises(UsageError, match="10 of 40 layers can go in 847,660,528 ways"):
        CRITERIA["oracle"].choose(10, Known(40, additive([1.0] * 40)))


def test_greedy_looks_at_every_layer_that_is_left_and_no_more() -> None:
    known = Known(8, additive([1.0] * 8))
    CRITERIA["greedy"].choose(3, known)
    assert len(known.asked) == 8 + 7 + 6


def test_evolution_finds_what_greedy_misses_and_the_same_by_the_same_seed() -> None:
    """Layer 0 alone is the cheapest, but the best six are those that go together."""
    together = frozenset({3, 7, 9, 11, 12, 14})
    costs = [0.1 if layer == 0 else 0.3 + 0.01 * layer for layer in range(16)]

    def loss(gone: frozenset[int]) -> float:
        return 1.0 + sum(costs[layer] for layer in gone) - 0.4 * max(0, len(gone & together) - 2)

    greedy, evolved = (CRITERIA[name].choose(6, Known(16, loss)).plan.dropped for name in ("greedy", "evolve"))
    assert 0 in greedy and evolved == tuple(sorted(together)) and loss(frozenset(evolved)) < loss(frozenset(greedy))
    assert CRITERIA["evolve"].choose(6, Known(16, loss)) == CRITERIA["evolve"].choose(6, Known(16, loss))


class Mended(Known):
    """The same, where a repair makes another loss of what is gone."""

    def __init__(self, layers: int, loss: Callable[[frozenset[int]], float], mended: Any) -> None:
        super().__init__(layers, loss)
        self.after, self._mended, self.repairs = "refit", mended, []

    def repaired(self, plan: Plan) -> Known:
        if not plan.dropped:
            return self
        self.repairs.append(plan.dropped)
        gone = frozenset(plan.dropped)
        return Known(self.layers, lambda more: self._mended(gone) + self.loss(more) - self.loss(gone))


def test_best_judges_its_last_round_after_the_repair() -> None:
    """Dropping 3 and 4 costs least as cut, 3 and 5 once repaired."""
    costs = [5.0, 4.0, 3.0, 0.2, 0.1, 0.3, 4.0, 5.0]
    known = Mended(8, additive(costs), lambda gone: 1.0 + (0.01 if gone == {3, 5} else 0.1))
    made = CRITERIA["best"].choose(2, known)
    assert made.plan.dropped == (3, 5) and made.details["repaired"]["3,5"] == pytest.approx(0.01)
    assert len([gone for gone in known.repairs if gone]) == CRITERIA["best"].repairs(2)  # type: ignore[attr-defined]
    assert CRITERIA["best"].choose(2, Known(8, additive(costs))).plan.dropped == (3, 4)


def test_what_noise_does_not_tell_apart_is_decided_by_the_answers_that_are_lost() -> None:
    """3 and 4 cost least by a hundredth, and lose more answers than 4 and 5, but not than others."""
    costs, lost = [5.0, 4.0, 3.0, 0.2, 0.1, 0.21, 4.0, 5.0], {(3, 4): 0.2, (4, 5): 0.1}

    def chosen(error: float, *, answers: bool = True) -> Any:
        class Noisy(Mended):
            def judged_repaired(self, plans: Sequence[Plan]) -> Any:
                each = [self.loss(frozenset(plan.dropped)) for plan in plans]
                return table(each, [lost.get(plan.dropped, 0.0) for plan in plans] if answers else (), error)

        return CRITERIA["best"].choose(2, Noisy(8, additive(costs), additive(costs)))

    assert chosen(0.005).plan.dropped == (3, 4) == chosen(0.05, answers=False).plan.dropped
    made = chosen(0.05)
    assert made.plan.dropped == (4, 5) and made.reason.endswith(
        "of 2 that noise does not tell apart it loses the fewest answers"
    )
    assert made.details["answers"]["3-4"] == 0.2 and made.details["repaired"]["3-4"] == pytest.approx(0.3)
    assert chosen(float("nan")).plan.dropped == (3, 4)  # of one sample


def test_greedy_looks_at_what_a_repair_leaves_between_removals() -> None:
    """Once layer 1 is gone and repaired, layer 0 does its work and must stay."""
    costs = [0.2, 0.1, 0.3, 4.0]

    class Shifted(Mended):
        def repaired(self, plan: Plan) -> Known:
            return super().repaired(plan) and Known(4, additive([9.0, *costs[1:]]) if plan.dropped else self.loss)

    known = Shifted(4, additive(costs), lambda gone: 1.0)
    assert CRITERIA["greedy"].choose(2, known).plan.dropped == (1, 2)
    assert CRITERIA["greedy"].choose(2, Known(4, additive(costs))).plan.dropped == (0, 1)


def test_reasons_and_details_are_plain_data() -> None:
    for name in OWN:
        made = CRITERIA[name].choose(2, Known(8, additive([float(i) for i in range(8)])))
        assert made.reason and "\n" not in made.reason
        assert json.loads(json.dumps(made.to_data())) == made.to_data(), name
