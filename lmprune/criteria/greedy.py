"""Drop the layer without which the loss is lowest, look again at what is left, and go on.

SLEB, Song et al. 2024, arXiv 2402.09025, algorithm 1. Its barriers, which keep the first and the last layer, are not
built in: protect them where you want that. With a repair (``--after``) what is left is repaired between removals: the
loop of Prune&Comp (arXiv 2507.18212) and, with a closed form in place of training, of IteRABRe (arXiv 2503.06291).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lmprune.criteria.evidence import Choice, Evidence, one_after_another, rounded
from lmprune.cuts.plan import Plan

OBJECTIVE = "loss"
"""Unless another is asked for."""


def repairs(count: int) -> int:
    """How many cuts are repaired to choose ``count`` layers, where a repair is asked for."""
    return count - 1


def choose(count: int, evidence: Evidence) -> Choice:
    """``count`` layers, one after the other."""

    def costs(plan: Plan, layers: Sequence[int]) -> Iterable[float]:
        return evidence.repaired(plan).ranked([Plan(plan.layers, (*plan.dropped, layer)) for layer in layers])

    path = one_after_another(count, evidence, costs)
    loss = list(path.values())[-1]
    between = f", {evidence.after} between them" if evidence.after else ""
    said = f"in this order: {', '.join(map(str, path))}{between}, down to a loss of {loss:.4f} nats a token"
    return Choice(Plan(evidence.layers, tuple(path)), said, {"losses": rounded(path)})
