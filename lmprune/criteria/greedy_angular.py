"""Drop the layer whose input and output lie closest, measure what is left again, and go on.

The angular distance of Gromov et al. (arXiv 2403.17887, equation 7) of single layers, measured anew after each removal,
as Maximum Redundancy Pruning (arXiv 2503.18377) measures redundancy anew.
"""

from __future__ import annotations

from lmprune.criteria.evidence import Choice, Evidence, may_go, rounded
from lmprune.cuts.plan import Plan


def choose(count: int, evidence: Evidence) -> Choice:
    """``count`` layers, one after the other."""
    free, plan, path = set(may_go(evidence, count)), Plan(evidence.layers), {}
    for _ in range(count):
        profile = evidence.profile(plan if plan.dropped else None)
        distances = {layer: profile.distance(at, 1) for at, layer in enumerate(plan.kept) if layer in free}
        best = min(distances, key=lambda layer: (distances[layer], layer))
        path[best] = distances[best]
        free.discard(best)
        plan = Plan(evidence.layers, (*plan.dropped, best))
    said = f"in this order: {', '.join(map(str, path))}, by angular distance in what was left"
    return Choice(plan, said, {"distances": rounded(path)})
