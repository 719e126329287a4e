"""Which layers several pruned models have in common from layer 0 on, and in which order that is best used. Pure.

The kept layers of the models form a tree: an edge is a layer, and two models share their edges up to the first layer
in which they differ. Walking the tree depth first, every edge is computed once; a state is kept only while a later
model of the same branch needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmprune.cuts.plan import Plan


def paths_of(plans: Mapping[str, Plan]) -> dict[str, tuple[int, ...]]:
    """The kept layers of each model in order, as numbers that are equal where the layers are.

    A part that says what it cuts of each layer leaves the others as they are; models with a part of another kind have
    layers in common only with models of the very same parts.

    >>> paths_of({"whole": Plan(4), "cut": Plan(4, (2,))})
    {'whole': (0, 1, 2, 3), 'cut': (0, 1, 3)}
    """
    cuts = {name: [(layer, _cut_of(plan, layer)) for layer in plan.kept] for name, plan in plans.items()}
    kinds = {
        cut: number for number, cut in enumerate(dict.fromkeys([(), *(c for path in cuts.values() for _, c in path)]))
    }
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
        start: how many of them an earlier turn has computed; that turn left the state after them.
        saves: after how many of its layers the state is needed by a later turn, ascending; all above ``start``.
    """

    name: str
    path: tuple[int, ...]
    start: int
    saves: tuple[int, ...]


def walk(paths: Mapping[str, Sequence[int]], most: int | None = None) -> list[Turn]:
    """The turns of a depth-first walk over the tree of ``paths``, given by model name.

    Args:
        most: states that are kept at once; a turn whose own state is not kept starts from the nearest one before it.

    >>> [(turn.name, turn.start, turn.saves) for turn in walk({"whole": [0, 1, 2, 3], "cut": [0, 1, 3]})]
    [('whole', 0, (2,)), ('cut', 2, ())]
    """
    order = sorted(paths, key=lambda name: tuple(paths[name]))
    common = [0, *(_common(paths[a], paths[b]) for a, b in zip(order, order[1:]))]
    held: list[int] = []
    turns = []
    for number, name in enumerate(order):
        held = [depth for depth in held if depth <= common[number]]
        start = held[-1] if held else 0
        saves = _thinned(_wanted(common[number + 1 :], start), None if most is None else most - len(held))
        held += saves
        turns.append(Turn(name, tuple(paths[name]), start, tuple(saves)))
    return turns


def _wanted(common: Sequence[int], start: int) -> list[int]:
    """Depths beyond ``start`` of this turn's path at which later turns leave it, ascending.

    ``common`` is what each later turn has in common with the one before it.
    """
    found, least = set(), max(common, default=0) + 1
    for depth in common:
        if depth < least:
            found.add(depth)
            least = depth
        if least <= start:
            break
    return sorted(depth for depth in found if depth > start)


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


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
