"""From a budget to a choice: the search, what each part of the best shape gave, and the frontier."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmprune.budgeting.budget import AXES, KINDS, USUAL, Budget, BudgetSettings, Shape, usual_multiple
from lmprune.budgeting.lab import ModelLab
from lmprune.budgeting.search import Search, Step, Way
from lmprune.choosing.evidence import ModelEvidence
from lmprune.criteria.best import OBJECTIVE
from lmprune.criteria.evidence import Choice
from lmprune.errors import ModelError, UsageError

_say = logging.getLogger("lmprune").info
OF_EXPERTS = 8
"""What sizes of experts must be multiples of: torch's grouped products want rows of 16 bytes, and weights have two."""
CRITERION = "best"
"""What searches is called so, whether it is layers alone that it chooses or more."""


@dataclass(frozen=True)
class Point:
    """A shape of the frontier; losses are nats a token above the whole model's, by the objective, on unseen text.

    Attributes:
        shape: for people.
        parameters: the share that is left, without embeddings.
        megabytes: of all weights.
        cut: as it is cut.
        repaired: once what is left is solved anew, as `lmprune heal --method refit` does.
        speed: times as fast as the whole model; None where its weights wait in files.
    """

    shape: str
    parameters: float
    megabytes: float
    cut: float
    repaired: float
    speed: float | None

    def to_data(self) -> dict[str, Any]:
        """Plain data for the recipe."""
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in vars(self).items()}


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        choice: the plan, and what it rests on.
        frontier: from the whole model to the budget; the last is what was chosen.
        gave: by each kind of cut, of what was chosen, the share of the parameters that it saves, and the loss without
            it, in nats less.
        notes: what the user should be told.
    """

    choice: Choice
    frontier: tuple[Point, ...]
    gave: Mapping[str, tuple[float, float]]
    notes: tuple[str, ...]


def choose_by_budget(settings: BudgetSettings, evidence: ModelEvidence) -> Found:
    """Search for the best model under a budget.

    Args:
        evidence: as `ModelEvidence.in_float32` gives it; by the objective of `best` where none is asked for.

    Raises:
        UsageError: the budget makes no sense, or cannot be reached.
        ModelError: what ``--with`` names cannot be cut from this model.
        DataError, NetworkError: the text cannot be had.
    """
    settings.check()
    budget = Budget.of(settings)
    named = settings.named
    judging = evidence.by(evidence.how.objective or OBJECTIVE)
    lab = ModelLab(judging, budget, neurons=settings.neurons, fit_tokens=settings.fit_tokens)
    kinds = _kinds(named, lab)
    multiple = _multiple(settings.multiple, lab, kinds)
    way = Search(lab, kinds, lab.limit(), multiple, _say, settings.steps).run()
    assert way.best is not None, "a search ends with the best"
    frontier = tuple(_point(step, lab) for step in _ascending(way))
    gave = _gave(way.best.shape, lab)
    chosen, trials = frontier[-1], len(lab.tried) - 1
    details = {
        "objective": judging.objective,
        "budget": {budget.what: budget.value, "multiple": multiple, "with": list(kinds)},
        "shape": way.best.shape.describe(lab.whole),
        "costs": {
            "cut": round(chosen.cut, 6), "repaired": round(chosen.repaired, 6)
        },
        "gave": {kind: {"saves": round(saved, 4), "costs": round(cost, 6)} for kind, (saved, cost) in gave.items()},
        "frontier": [point.to_data() for point in frontier],
        "trials": trials,
        "passes": round(lab.passes, 1),
    }  # fmt: skip
    reason = (
        f"the best of {trials} trials for {budget.describe()}: on unseen text "
        f"{chosen.repaired:+.4f} nats a token by {judging.objective} once refitted, "
        f"{chosen.cut:+.4f} before"
    )
    choice = Choice(lab.plan(way.best.shape), reason, details, CRITERION)
    return Found(choice, frontier, gave, tuple(lab.notes))


def _kinds(named: tuple[str, ...] | None, lab: ModelLab) -> tuple[str, ...]:
    """What is cut: as asked for, or what this model allows."""
    if named is not None:
        for kind in named:
            if kind != "depth":
                _required(kind, lab)
        return tuple(kind for kind in KINDS if kind in named)
    allowed = []
    for kind in USUAL:
        try:
            if kind != "depth":
                lab.require(kind)
        except ModelError as exc:
            _say(f"without {kind}: {exc}")
        else:
            allowed.append(kind)
    return tuple(allowed)


def _required(kind: str, lab: ModelLab) -> None:
    try:
        lab.require(kind)
    except ModelError as exc:
        raise UsageError(f"--with {kind}: {exc}") from exc


def _multiple(asked: int | None, lab: ModelLab, kinds: tuple[str, ...]) -> int:
    whole, least = lab.whole, OF_EXPERTS if lab.has_experts and {"ffn", "slice"} & set(kinds) else 1
    if asked is None:
        return max(least, usual_multiple(whole))
    if asked % least:
        raise UsageError(
            f"--multiple {asked}: experts are multiplied in groups, whose rows must be of 16 bytes each. "
            f"Give a multiple of {least}"
        )
    for kind in kinds:
        axis = AXES.get(kind)
        if axis in ("ffn", "hidden") and asked >= getattr(whole, axis):
            what = "neurons" if axis == "ffn" else "channels"
            raise UsageError(
                f"--multiple {asked}: this model has {getattr(whole, axis)} {what}, so that none could go. Give less"
            )
    return asked


def _ascending(way: Way) -> list[Step]:
    """The frontier: from the whole model on, without what the chosen shape is better and smaller than; it is last."""
    assert way.best is not None
    best = way.best
    return [step for step in way.steps if step.amount > best.amount and step.shape != best.shape] + [best]


def _point(step: Step, lab: ModelLab) -> Point:
    whole = lab.trial(lab.whole).judged
    inner, every = lab.parameters(step.shape)
    return Point(
        step.shape.describe(lab.whole),
        inner / lab.parameters(lab.whole)[0],
        every * lab.bytes / 1e6,
        lab.as_cut(step.shape) - whole,
        lab.trial(step.shape).judged - whole,
        lab.speed(step.shape) if lab.has_speed else None,
    )


def _gave(shape: Shape, lab: ModelLab) -> dict[str, tuple[float, float]]:
    """What each kind of cut saves of the parameters, and costs, found by undoing it alone."""
    undone = {kind: shape.to(axis, getattr(lab.whole, axis)) for kind, axis in AXES.items()}
    undone["depth"] = replace(shape, dropped=())
    total, here = lab.parameters(lab.whole)[0], lab.trial(shape).judged
    return {
        kind: ((lab.parameters(other)[0] - lab.parameters(shape)[0]) / total, here - lab.trial(other).judged)
        for kind, other in undone.items()
        if other != shape
    }


def draw_frontier(found: Found, path: Path) -> None:
    """The frontier as a picture: loss against size and against speed."""
    from lmprune.drawing.frontier import Spot, draw

    spots = [Spot(100 * p.parameters, p.speed, p.cut, p.repaired) for p in found.frontier]
    draw(spots, path)
