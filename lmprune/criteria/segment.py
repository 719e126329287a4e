"""Drop the contiguous segment without which the loss is lowest, of all segments of that length.

After CLP, "The Structural Scalpel", arXiv 2510.23652, which learns where one contiguous dip of a gate over the layers
should lie. It departs from the paper there: the place is one whole number, so every start is tried instead of learned.
"""

from __future__ import annotations

from lmprune.criteria.evidence import Choice, Evidence, free_blocks, rounded
from lmprune.cuts.plan import Plan, spell

OBJECTIVE = "kl"
"""CLP's."""


def choose(count: int, evidence: Evidence) -> Choice:
    """The best block of ``count`` layers."""
    blocks = free_blocks(evidence, count)
    losses = evidence.ranked([Plan(evidence.layers, tuple(block)) for block in blocks])
    best = blocks[int(losses.argmin())]
    said = f"of {len(blocks)} blocks {spell(best)} leaves the lowest loss, {losses.min():.4f} nats a token"
    table = {block[0]: float(loss) for block, loss in zip(blocks, losses)}
    return Choice(Plan(evidence.layers, tuple(best)), said, {"losses": rounded(table)})
