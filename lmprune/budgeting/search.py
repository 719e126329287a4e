"""The search for a shape under a budget: by added loss for what is saved, step by step, then by exchange. Pure.

From the whole model the cheapest move is made again and again: a layer less, or fewer neurons, a smaller hidden size,
fewer key-value groups, each in steps of an even share of what must go. What a move costs is measured on the model that
it leaves, repaired. Costs rise as more is cut, so a move that was dearer at the last look is not looked at again before
it could be the cheapest. Near the budget, shapes of the same size are tried that trade one kind for another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import lcm
from typing import Protocol

from lmprune.budgeting.budget import AXES, Shape
from lmprune.errors import UsageError

TRIED = 2
"""Layers of which the loss without them is lowest, that are tried at each step."""
ROUNDS = 4
"""Rounds of exchange at most."""


class Lab(Protocol):
    """What the search asks of a model. Each answer is kept by whoever gives it."""

    @property
    def whole(self) -> Shape:
        """The shape that nothing is cut from."""

    @property
    def depth(self) -> int:
        """Its layers."""

    @property
    def heads(self) -> int:
        """Its query heads, of whose number transformers wants the hidden size to be a multiple."""

    def amount(self, shape: Shape) -> float:
        """What the budget limits, of that shape."""

    def cost(self, shape: Shape) -> float:
        """Its loss, repaired, on the text that is chosen on."""

    def layers(self, shape: Shape) -> Sequence[int]:
        """Layers that may go besides, the cheapest first, as they are without repair."""

    def allows(self, shape: Shape) -> bool:
        """Whether it is worth a trial."""


@dataclass(frozen=True)
class Step:
    """A shape on the way, and the kind of the move that led to it."""

    kind: str
    shape: Shape
    amount: float
    cost: float


@dataclass
class Way:
    """How a search went.

    Attributes:
        steps: from the whole model on, each cheaper in amount; ``steps[0].kind`` is ``whole``.
        best: what is best under the budget.
    """

    steps: list[Step] = field(default_factory=list)
    best: Step | None = None


class Search:
    """One search.

    Args:
        kinds: what may be cut, of `lmprune.budgeting.budget.KINDS`.
        most: how much may be left.
        multiple: of neurons and hidden size.
        say: is told of each step.
        steps: moves of which each saves an even share, about.
    """

    def __init__(
        self,
        lab: Lab,
        kinds: Sequence[str],
        most: float,
        multiple: int,
        say: Callable[[str], None] = lambda text: None,
        steps: int = 6,
    ) -> None:
        self._lab, self._kinds, self._most, self._multiple, self._say = lab, tuple(kinds), most, multiple, say
        self._steps = steps

    def run(self) -> Way:
        """Search.

        Raises:
            UsageError: the budget cannot be reached with these kinds.
        """
        lab, here = self._lab, self._lab.whole
        self._require_reach()
        way = Way([Step("whole", here, lab.amount(here), lab.cost(here))])
        portion = (way.steps[0].amount - self._most) / self._steps
        stale: dict[str, float] = {}
        while way.steps[-1].amount > self._most:
            step = self._cheapest(way.steps[-1], portion, stale)
            if step is None:
                raise UsageError(
                    f"the budget cannot be reached with {','.join(self._kinds)}: {way.steps[-1].shape.describe(here)} "
                    "is as far as it goes. Allow more, or a smaller --multiple"
                )
            way.steps.append(step)
            self._say(f"{step.shape.describe(here)}: {step.cost - way.steps[0].cost:+.4f}")
        way.best = self._exchanged(way.steps[-1])
        return way

    # --- step by step ---------------------------------------------------------------------------------------------

    def _cheapest(self, last: Step, portion: float, stale: dict[str, float]) -> Step | None:
        """The move of the least added loss for what it saves; ``stale`` are prices at an earlier look."""
        fresh: dict[str, tuple[float, Step]] = {}
        moves = {kind: found for kind in self._kinds if (found := list(self._moves(kind, last, portion)))}
        for kind in sorted(moves, key=lambda kind: stale.get(kind, float("-inf"))):
            known = min((price for price, _ in fresh.values()), default=float("inf"))
            if stale.get(kind, float("-inf")) >= known:
                continue
            priced: list[tuple[float, Step]] = []
            for shape in moves[kind]:
                amount, cost = self._lab.amount(shape), self._lab.cost(shape)
                if amount < last.amount:
                    # What falls below the budget saves no more than was asked for.
                    saved = last.amount - max(amount, self._most)
                    priced.append(((cost - last.cost) / saved, Step(kind, shape, amount, cost)))
            if priced:
                fresh[kind] = min(priced, key=lambda each: each[0])
                stale[kind] = fresh[kind][0]
        return min(fresh.values(), key=lambda each: each[0])[1] if fresh else None

    def _moves(self, kind: str, last: Step, portion: float) -> Iterator[Shape]:
        """The shapes that one move of that kind leads to."""
        shape, wanted = last.shape, max(self._most, last.amount - portion)
        if kind == "depth":
            yield from (shape.without(layer) for layer in self._lab.layers(shape)[:TRIED])
            return
        moved = self._fitted(shape, AXES[kind], wanted)
        if moved is not None and moved != shape and self._lab.allows(moved):
            yield moved

    def _sizes(self, axis: str) -> list[int]:
        """The sizes that an axis may take, ascending, the whole one last."""
        whole = getattr(self._lab.whole, axis)
        if axis == "groups":
            return list(range(1, whole + 1))
        step = lcm(self._multiple, self._lab.heads) if axis == "hidden" else self._multiple
        return [*range(step, whole, step), whole]

    def _fitted(self, shape: Shape, axis: str, most: float) -> Shape | None:
        """``shape`` with the largest size along ``axis`` of which at most ``most`` is left; None where none is."""
        sizes = self._sizes(axis)
        low, high = -1, len(sizes) - 1  # the largest index that fits
        while low < high:
            middle = (low + high + 1) // 2
            if self._lab.amount(shape.to(axis, sizes[middle])) <= most:
                low = middle
            else:
                high = middle - 1
        return shape.to(axis, sizes[low]) if low >= 0 else None

    def _require_reach(self) -> None:
        """Refuse a budget that nothing can keep to, before anything is measured."""
        smallest = self._lab.whole
        for kind in self._kinds:
            if kind == "depth":
                for layer in list(self._lab.layers(smallest))[: self._lab.depth - 1]:
                    smallest = smallest.without(layer)
            else:
                smallest = smallest.to(AXES[kind], self._sizes(AXES[kind])[0])
        least = self._lab.amount(smallest)
        if least > self._most:
            raise UsageError(
                f"the budget cannot be reached with {','.join(self._kinds)}: at the least {least:,.6g} is left of "
                f"{self._lab.amount(self._lab.whole):,.6g}, and {self._most:,.6g} is asked for. Allow more"
            )

    # --- exchange -------------------------------------------------------------------------------------------------

    def _exchanged(self, start: Step) -> Step:
        """The best under the budget that trades lead to."""
        best, whole = self._filled(start), self._step(self._lab.whole).cost
        for _ in range(min(ROUNDS, self._steps)):
            trades = [self._step(shape) for shape in dict.fromkeys(self._trades(best.shape)) if self._lab.allows(shape)]
            better = min(trades, key=lambda step: step.cost, default=best)
            if not better.cost < best.cost:
                break
            best = better
            self._say(f"by exchange: {best.shape.describe(self._lab.whole)}: {best.cost - whole:+.4f}")
        return best

    def _step(self, shape: Shape) -> Step:
        return Step("exchange", shape, self._lab.amount(shape), self._lab.cost(shape))

    def _filled(self, step: Step) -> Step:
        """What more room allows, where a layer took more than was asked for."""
        filled = {self._fitted(step.shape, AXES[kind], self._most) for kind in self._kinds if kind in AXES}
        steps = [self._step(shape) for shape in sorted(shape for shape in filled if shape is not None)]
        return min([step, *steps], key=lambda each: each.cost)

    def _trades(self, shape: Shape) -> Iterator[Shape]:
        """Shapes under the budget in which one kind gives and another takes."""
        axes = [AXES[kind] for kind in self._kinds if kind in AXES]
        changed: list[tuple[str, Shape]] = []
        if "depth" in self._kinds:
            free = self._lab.layers(shape)
            changed += [("", shape.without(layer)) for layer in free[:1]]
            for gone in shape.dropped:
                rest = tuple(layer for layer in shape.dropped if layer != gone)
                back = Shape(rest, shape.ffn, shape.hidden, shape.groups)
                changed.append(("", back))
                yield from (back.without(layer) for layer in free[:1])
        for axis in axes:
            sizes = self._sizes(axis)
            at = min(range(len(sizes)), key=lambda i: abs(sizes[i] - getattr(shape, axis)))
            stride = max(1, len(sizes) // 16)
            changed += [(axis, shape.to(axis, sizes[j])) for j in (at - stride, at + stride) if 0 <= j < len(sizes)]
        for axis, other in changed:
            for filled in axes:
                if filled != axis:
                    fitted = self._fitted(other, filled, self._most)
                    if fitted is not None and fitted != shape:
                        yield fitted
