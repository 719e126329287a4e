"""Drop the layers with the smallest weights.

Shortened LLaMA's Magnitude+ (Kim et al. 2024, arXiv 2402.02834): the sum of |W| over a layer's matrices; the first four
and the last two layers stay. Where layers are protected by hand, those stay instead.
"""

from __future__ import annotations

from lmprune.criteria.evidence import Choice, Evidence, cheapest, may_go, rounded
from lmprune.cuts.plan import Plan, spell

READS_TEXT = False
"""Whether calibration text, or a profile of it, is read."""


def ends(layers: int) -> set[int]:
    """The paper's protected layers, as far as the model has more."""
    return {0, 1, 2, 3, layers - 2, layers - 1} if layers > 8 else {0, layers - 1}


def choose(count: int, evidence: Evidence) -> Choice:
    """The ``count`` layers of the smallest sum of absolute weights."""
    free = may_go(evidence, count, () if evidence.protected else ends(evidence.layers))
    sums = dict.fromkeys(free, 0.0)
    for layer, _, value in evidence.weights():
        if layer in sums and value.ndim > 1:
            sums[layer] += float(abs(value).sum(dtype="float64"))
    gone = cheapest(sums, count)
    said = f"the smallest weights are those of {spell(gone)}"
    return Choice(Plan(evidence.layers, gone), said, {"sums": rounded(sums)})
