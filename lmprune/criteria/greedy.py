"""Drop the layer without which the loss is lowest, look again at what is left, and go on.

SLEB, Song et al. 2024, arXiv 2402.09025, algorithm 1. Its barriers, which keep the first and the last layer, are not
built in: protect them where you want that.
"""

from __future__ import annotations

from lmprune.criteria.evidence import Choice, Evidence, may_go, rounded
from lmprune.cuts.plan import Plan


def choose(count: int, evidence: Evidence) -> Choice:
    """``count`` layers, one after the other."""
    free = set(may_go(evidence, count))
    plan, path, loss = Plan(evidence.layers), {}, 0.0
    for _ in range(count):
        left = sorted(free)
        losses = evidence.losses([Plan(evidence.layers, (*plan.dropped, layer)) for layer in left]).mean()
        best = left[int(losses.argmin())]
        loss = path[best] = float(losses.min())
        free.discard(best)
        plan = Plan(evidence.layers, (*plan.dropped, best))
    said = f"in this order: {', '.join(map(str, path))}, down to a loss of {loss:.4f} nats a token"
    return Choice(plan, said, {"losses": rounded(path)})
