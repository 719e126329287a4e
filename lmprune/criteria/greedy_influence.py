"""Drop the layer of the least block influence, measure what is left again, and go on.

ShortGPT's influence (arXiv 2403.03853), measured anew after each removal: the idea that Maximum Redundancy Pruning
(arXiv 2503.18377) has for sparsity, here for depth.
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
        return [float(profile.block_influence[place[layer]]) for layer in layers]

    path = one_after_another(count, evidence, costs)
    said = f"in this order: {', '.join(map(str, path))}, by block influence in what was left"
    return Choice(Plan(evidence.layers, tuple(path)), said, {"block_influence": rounded(path)})
