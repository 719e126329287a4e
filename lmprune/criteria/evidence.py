"""What a criterion may ask for, and what it answers. Pure: the evidence itself is made by `lmprune.choosing`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lmprune.cuts.plan import Plan, spell
from lmprune.cuts.sublayers import PROJECTIONS, plan_of
from lmprune.errors import PlanError
from lmprune.profiling.distances import Profile

Array = NDArray[np.float64]


class Losses(Protocol):
    """The losses of some plans on the same samples, by an objective."""

    @property
    def values(self) -> Array:
        """(plans, samples) nats a token, the mean over each sample's tokens."""

    @property
    def tokens(self) -> NDArray[np.int64]:
        """(samples,) how many tokens were counted."""

    @property
    def parts(self) -> Mapping[str, Losses]:
        """Of a mix, the losses by each of its objectives, by its name."""

    def mean(self) -> Array:
        """(plans,) nats a token over all tokens; of a mix, the weighted mean of its objectives."""

    def errors(self, than: int = 0) -> Array:
        """(plans,) standard errors of how much more than plan ``than`` each loses, on the same samples."""


class Evidence(Protocol):
    """A model as a criterion sees it. Each question costs what it costs when it is asked, and no more the second time.

    All answers are on the same calibration text. Layers and plans are those of the model that is cut, of which
    ``Plan(layers, ())`` is the whole.

    Attributes:
        layers: how many decoder layers there are.
        protected: layers that must stay.
        seed: of whatever a criterion draws.
        objective: by what losses are measured: ``loss``, ``kl``, ``loss+self``, ...
        judging: the same of what is judged, for people.
        after: the repair after which cuts are judged; None: none was asked for.
    """

    layers: int
    protected: frozenset[int]
    seed: int
    objective: str
    judging: str
    after: str | None

    def profile(self, plan: Plan | None = None) -> Profile:
        """Angular distances, block influence and norms of the model, or of what ``plan`` leaves of it."""

    def losses(self, plans: Sequence[Plan]) -> Losses:
        """What each plan makes of the objective. Plans that begin alike share the layers that they begin with."""

    def ranked(self, plans: Sequence[Plan]) -> Array:
        """(plans,) losses for finding the lowest, by racing: plans that are surely worse are dropped early, and theirs
        is an estimate."""

    def judged(self, plans: Sequence[Plan]) -> Losses:
        """As `losses`, on text that no other answer was made from."""

    def judged_repaired(self, plans: Sequence[Plan]) -> Losses:
        """As `judged`, each plan after a repair of its own, where one is asked for."""

    def repaired(self, plan: Plan) -> Evidence:
        """The losses of the model that is left without what ``plan`` drops, once it is repaired.

        All plans asked of it drop that too, and none is repaired again. Without `after` it is this evidence itself.
        """

    def states(self, places: Sequence[int], plan: Plan | None = None) -> Iterator[Mapping[int, NDArray[np.float32]]]:
        """Batch by batch, the states at ``places``: (tokens, width) each, without padding.

        State l is the input of layer l; the last is the output of the last layer.
        """

    def weights(self) -> Iterator[tuple[int, str, NDArray[np.float32]]]:
        """Of every parameter of every layer: layer, name within it, and value."""

    def gradients(self) -> Iterator[tuple[int, str, NDArray[np.float32], NDArray[np.float32]]]:
        """Of every parameter of every layer: layer, name within it, value, and gradient of the mean loss.

        Raises:
            UsageError: the weights are quantised and have none.
        """


def may_go(evidence: Evidence, count: int, also_protected: Iterable[int] = ()) -> tuple[int, ...]:
    """The layers of which ``count`` can be dropped, ascending.

    Raises:
        PlanError: protection leaves fewer.
    """
    kept = evidence.protected | set(also_protected)
    free = tuple(layer for layer in range(evidence.layers) if layer not in kept)
    if count > len(free):
        raise PlanError(
            f"{count} layers cannot go: of {evidence.layers}, {spell(sorted(kept))} must stay. Drop at most {len(free)}"
        )
    return free


def cheapest(values: Mapping[int, float], count: int) -> tuple[int, ...]:
    """The ``count`` keys with the smallest values, ascending; of equals the lower key."""
    return tuple(sorted(sorted(values, key=lambda key: (values[key], key))[:count]))


def free_blocks(evidence: Evidence, count: int) -> list[range]:
    """The blocks of ``count`` consecutive layers that can be dropped.

    Raises:
        PlanError: protection leaves none.
    """
    free = set(may_go(evidence, count))
    blocks = [range(start, start + count) for start in range(evidence.layers - count + 1)]
    blocks = [block for block in blocks if free >= set(block)]
    if not blocks:
        raise PlanError(f"no block of {count} layers is free of protected ones. Protect fewer, or drop fewer")
    return blocks


def one_after_another(
    count: int, evidence: Evidence, costs: Callable[[Plan, Sequence[int]], Iterable[float]]
) -> dict[int, float]:
    """Drop the cheapest layer, look again at what is left, and go on: the layers in that order, with their costs.

    Args:
        costs: of dropping each of these layers besides what the plan drops.
    """
    free = list(may_go(evidence, count))
    path: dict[int, float] = {}
    for _ in range(count):
        table = dict(zip(free, costs(Plan(evidence.layers, tuple(path)), free)))
        (best,) = cheapest(table, 1)
        path[best] = float(table[best])
        free.remove(best)
    return path


def sublayers_one_after_another(count: int, evidence: Evidence) -> Choice:
    """Drop the cheapest of the attention and MLP sublayers, look again at what is left, and go on."""
    free = [(layer, name) for layer in may_go(evidence, count // 2) for name in PROJECTIONS]
    gone: dict[tuple[int, str], float] = {}
    for _ in range(count):
        plans = {part: plan_of(evidence.layers, (*gone, part)) for part in free if _leaves_one(evidence, (*gone, part))}
        costs = evidence.ranked(list(plans.values()))
        best = list(plans)[int(costs.argmin())]
        gone[best] = float(costs.min())
        free.remove(best)
    order = ", ".join(f"{name} {layer}" for layer, name in gone)
    said = f"in this order: {order}, down to {list(gone.values())[-1]:.4f} nats a token"
    table = {f"{name} {layer}": round(cost, 6) for (layer, name), cost in gone.items()}
    return Choice(plan_of(evidence.layers, gone), said, {"costs": table})


def _leaves_one(evidence: Evidence, gone: Sequence[tuple[int, str]]) -> bool:
    whole = [layer for layer in range(evidence.layers) if all((layer, name) in gone for name in PROJECTIONS)]
    return len(whole) < evidence.layers


def rounded(values: Mapping[int, float]) -> dict[str, float]:
    """A table of numbers as a recipe keeps it."""
    return {str(key): round(float(value), 6) for key, value in values.items()}


@dataclass(frozen=True, repr=False)
class Choice:
    """What a criterion chose.

    Attributes:
        plan: what goes.
        reason: why, in one line for people.
        details: what the choice rests on, as plain data for the recipe.
        criterion: the name it goes by; `lmprune.choose` fills it in.
    """

    plan: Plan
    reason: str
    details: Mapping[str, Any] = field(default_factory=dict)
    criterion: str | None = None

    def to_data(self) -> dict[str, Any]:
        """What a recipe keeps of it."""
        return {"summary": self.reason, **self.details}

    def __repr__(self) -> str:
        return f"<Choice {self.criterion or 'by hand'}: {self.plan.describe()}; {self.reason}>"

    def _repr_html_(self) -> str:
        """The layers as a row of cells, for a notebook."""
        from html import escape

        cells = "".join(_cell(layer, layer in self.plan.dropped) for layer in range(self.plan.layers))
        return f"<div>{escape(self.plan.describe())}</div><div>{cells}</div><div>{escape(self.reason)}</div>"


def _cell(layer: int, gone: bool) -> str:
    style = "opacity:.35;text-decoration:line-through" if gone else "font-weight:bold"
    return f'<span style="border:1px solid;padding:0 .4em;{style}">{layer}</span>'
