"""Drop the layer whose input and output lie closest, measure what is left again, and go on.

The angular distance of Gromov et al. (arXiv 2403.17887, equation 7) of single layers, measured anew after each removal,
as Maximum Redundancy Pruning (arXiv 2503.18377) measures redundancy anew.
"""

from __future__ import annotations

from collections.abc import Sequence

from lmprune.criteria.evidence import Choice, Evidence, one_after_another, rounded
from lmprune.cuts.plan import Plan


def choose(count: int, evidence: Evidence) -> Choice:
    """``count`` layers, one after the other."""

    def costs(plan: Plan, layers: Sequence[int]) -> list[float]:
        profile = evidence.profile(plan if plan.dropped else None)
        place = {layer: at for at, layer in enumerate(plan.kept)}
        return [profile.distance(place[layer], 1) for layer in layers]

    path = one_after_another(count, evidence, costs)
    said = f"in this order: {', '.join(map(str, path))}, by angular distance in what was left"
    return Choice(Plan(evidence.layers, tuple(path)), said, {"distances": rounded(path)})
