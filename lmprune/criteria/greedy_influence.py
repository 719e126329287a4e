"""Drop the layer of the least block influence, measure what is left again, and go on.

ShortGPT's influence (arXiv 2403.03853), measured anew after each removal: the idea that Maximum Redundancy Pruning
(arXiv 2503.18377) has for sparsity, here for depth.
"""

from __future__ import annotations

from lmprune.criteria.evidence import Choice, Evidence, may_go, rounded
from lmprune.cuts.plan import Plan


def choose(count: int, evidence: Evidence) -> Choice:
    """``count`` layers, one after the other."""
    free, plan, path = set(may_go(evidence, count)), Plan(evidence.layers), {}
    for _ in range(count):
        profile = evidence.profile(plan if plan.dropped else None)
        influence = {layer: float(profile.block_influence[at]) for at, layer in enumerate(plan.kept) if layer in free}
        best = min(influence, key=lambda layer: (influence[layer], layer))
        path[best] = influence[best]
        free.discard(best)
        plan = Plan(evidence.layers, (*plan.dropped, best))
    said = f"in this order: {', '.join(map(str, path))}, by block influence in what was left"
    return Choice(plan, said, {"block_influence": rounded(path)})
