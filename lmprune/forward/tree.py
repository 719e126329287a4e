"""Which layers several pruned models have in common from layer 0 on, and in which order that is best used. Pure.

The kept layers of the models form a tree: an edge is a layer, and two models share their edges up to the first layer
in which they differ. Walking the tree depth first, every edge is computed once; a state is kept only while a later
model of the same branch needs it.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmprune.cuts.plan import Plan

Prefix = tuple[int, ...]
"""The layers that made a state, as `paths_of` numbers them."""
Kinds = dict[tuple[object, ...], int]
"""Ways to cut within a layer, numbered as they come; the first is not to cut it."""


def paths_of(plans: Mapping[str, Plan], kinds: Kinds | None = None) -> dict[str, Prefix]:
    """The kept layers of each model in order, as numbers that are equal where the layers are.

    Args:
        kinds: keeps the numbers for later calls, of other plans of the same model.

    A part that says what it cuts of each layer leaves the others as they are; models with a part of another kind have
    layers in common only with models of the very same parts.

    >>> paths_of({"whole": Plan(4), "cut": Plan(4, (2,))})
    {'whole': (0, 1, 2, 3), 'cut': (0, 1, 3)}
    """
    cuts = {name: [(layer, _cut_of(plan, layer)) for layer in plan.kept] for name, plan in plans.items()}
    kinds = {} if kinds is None else kinds
    for cut in [(), *(cut for path in cuts.values() for _, cut in path)]:
        kinds.setdefault(cut, len(kinds))
    return {name: tuple(kinds[cut] * plans[name].layers + layer for layer, cut in path) for name, path in cuts.items()}


def _cut_of(plan: Plan, layer: int) -> tuple[object, ...]:
    """What ``plan`` cuts of one layer that it keeps: equal where the layers are."""
    each = (getattr(part, "of_layer", lambda layer, part=part: part)(layer) for part in plan.parts)
    return tuple(cut for cut in each if cut != ())


@dataclass(frozen=True)
class Turn:
    """One model's turn in the walk.

    Attributes:
        name: the model.
        path: its kept layers, in order, as `paths_of` numbers them.
        start: how many of them are computed already: an earlier turn left the state after them, or an earlier walk.
        saves: after how many of its layers the state is needed by a later turn, ascending; all above ``start``.
        common: how many the turn before has as well; states after more than these are of no more use.
        known: whether it was an earlier walk that left the state at ``start``.
    """

    name: str
    path: Prefix
    start: int
    saves: tuple[int, ...]
    common: int = 0
    known: bool = False


def walk(
    paths: Mapping[str, Sequence[int]], most: int | None = None, known: Mapping[str, int] | None = None
) -> list[Turn]:
    """The turns of a depth-first walk over the tree of ``paths``, given by model name.

    Args:
        most: states that are kept at once; a turn whose own state is not kept starts from the nearest one before it.
        known: after how many of its layers an earlier walk left a model's state, at most.

    >>> [(turn.name, turn.start, turn.saves) for turn in walk({"whole": [0, 1, 2, 3], "cut": [0, 1, 3]})]
    [('whole', 0, (2,)), ('cut', 2, ())]
    """
    order = sorted(paths, key=lambda name: tuple(paths[name]))
    shared = [0, *(common(paths[a], paths[b]) for a, b in zip(order, order[1:]))]
    before = [(known or {}).get(name, 0) for name in order]
    held: list[int] = []
    turns = []
    for number, name in enumerate(order):
        held = [depth for depth in held if depth <= shared[number]]
        last = held[-1] if held else 0
        start = max(last, before[number])
        wanted = _wanted(shared[number + 1 :], start, before[number + 1 :])
        saves = _thinned(wanted, None if most is None else most - len(held))
        held += saves
        turns.append(Turn(name, tuple(paths[name]), start, tuple(saves), shared[number], start > last))
    return turns


def _wanted(shared: Sequence[int], start: int, known: Sequence[int]) -> list[int]:
    """Depths beyond ``start`` of this turn's path at which later turns leave it and need its state, ascending.

    ``shared`` is what each later turn has in common with the one before it, and ``known`` the depth from which an
    earlier walk lets it start.
    """
    found, least = set(), max(shared, default=0) + 1
    for depth, other in zip(shared, known):
        least = min(least, depth)
        if least <= start:
            break
        if other < least:
            found.add(least)
    return sorted(found)


def worth_keeping(turns: Sequence[Turn], room: int) -> frozenset[Prefix]:
    """Of the states of a walk, those that save a later one most, at most ``room``.

    The later walk is thought of as the same plans, each without one more of its layers, any with the same chance. A
    turn that computes l layers is then saved (l^2 - d1^2 - d2^2 - ...) / 2 of them by states that part these layers in
    runs of d1, d2, ...: most where the runs are alike. The next state goes where it adds most.

    >>> sorted(worth_keeping(walk({"whole": [0, 1, 2, 3, 4, 5], "cut": [0, 1, 3, 4, 5]}), 2))
    [(0, 1), (0, 1, 2, 3)]
    """
    runs, lengths = [1] * len(turns), [len(turn.path) - turn.start for turn in turns]
    gains = [(-_gain(length, 1), number) for number, length in enumerate(lengths) if length > 1]
    heapq.heapify(gains)
    for _ in range(min(room, sum(lengths) - len(lengths))):
        _, number = heapq.heappop(gains)
        runs[number] += 1
        if runs[number] < lengths[number]:
            heapq.heappush(gains, (-_gain(lengths[number], runs[number]), number))
    return frozenset(
        turn.path[: turn.start + place * length // count]
        for turn, length, count in zip(turns, lengths, runs)
        for place in range(1, count)
    )


def _gain(length: int, runs: int) -> int:
    """Twice what one run more than ``runs`` saves of ``length`` layers."""
    return _squares(length, runs) - _squares(length, runs + 1)


def _squares(length: int, runs: int) -> int:
    """The sum of the squares of ``runs`` whole numbers that sum to ``length`` and are as alike as can be."""
    each, more = divmod(length, runs)
    return more * (each + 1) ** 2 + (runs - more) * each**2


def _thinned(depths: list[int], room: int | None) -> list[int]:
    """At most ``room`` of them, evenly spaced, with the last.

    >>> _thinned([1, 2, 3, 4, 5], 2)
    [2, 5]
    """
    if room is None or len(depths) <= room:
        return depths
    return [depths[(place + 1) * len(depths) // room - 1] for place in range(room)]


def passes(turns: Sequence[Turn]) -> tuple[int, int]:
    """Layer passes a batch: with shared states, and by separate runs.

    >>> passes(walk({"whole": [0, 1, 2, 3], "cut": [0, 1, 3]}))
    (5, 7)
    """
    return sum(len(turn.path) - turn.start for turn in turns), sum(len(turn.path) for turn in turns)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
