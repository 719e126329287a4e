"""Drop the layers whose weights matter least to the loss, to first order.

Shortened LLaMA's Taylor+ (Kim et al. 2024, arXiv 2402.02834): the sum of |W dL/dW| over a layer's matrices; the first
four and the last two layers stay. Where layers are protected by hand, those stay instead.
"""

from __future__ import annotations

from lmprune.criteria.evidence import Choice, Evidence, cheapest, may_go, rounded
from lmprune.criteria.magnitude import ends
from lmprune.cuts.plan import Plan, spell

OBJECTIVE = "loss"
"""Unless another is asked for."""


def choose(count: int, evidence: Evidence) -> Choice:
    """The ``count`` layers of the smallest sum of absolute products of weight and gradient."""
    free = may_go(evidence, count, () if evidence.protected else ends(evidence.layers))
    sums = dict.fromkeys(free, 0.0)
    for layer, _, value, gradient in evidence.gradients():
        if layer in sums and value.ndim > 1:
            sums[layer] += float(abs(value * gradient).sum(dtype="float64"))
    gone = cheapest(sums, count)
    said = f"to first order the loss hangs least on the weights of {spell(gone)}"
    return Choice(Plan(evidence.layers, gone), said, {"sums": rounded(sums)})
