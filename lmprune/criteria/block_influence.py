"""Drop the layers that turn their input least.

ShortGPT, Men et al. 2024, arXiv 2403.03853, equation 1: BI_l = 1 - E cos(x^(l), x^(l+1)) over samples and tokens, each
layer measured by itself; the n lowest go, wherever they stand. Which tokens count is the profile's (``--token``).
"""

from __future__ import annotations

from lmprune.criteria.evidence import Choice, Evidence, cheapest, may_go, rounded
from lmprune.cuts.plan import Plan, spell


def choose(count: int, evidence: Evidence) -> Choice:
    """The ``count`` layers of the smallest block influence."""
    free = may_go(evidence, count)
    influence = {layer: float(evidence.profile().block_influence[layer]) for layer in free}
    gone = cheapest(influence, count)
    worst = max(influence[layer] for layer in gone)
    reason = f"block influence of {spell(gone)} is at most {worst:.4f}"
    return Choice(Plan(evidence.layers, gone), reason, {"block_influence": rounded(influence)})
