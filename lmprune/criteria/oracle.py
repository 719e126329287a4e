"""Try every way to drop so many layers: what no criterion can beat on its own measure. For small models."""

from __future__ import annotations

from itertools import combinations
from math import comb

from lmprune.criteria.evidence import Choice, Evidence, may_go
from lmprune.cuts.plan import Plan
from lmprune.errors import UsageError

MOST = 5000
"""Plans that are tried; beyond, it would take days on any model worth pruning."""

OBJECTIVE = "loss"
"""Unless another is asked for."""


def choose(count: int, evidence: Evidence) -> Choice:
    """The ``count`` layers without which the loss is lowest."""
    free = may_go(evidence, count)
    ways = comb(len(free), count)
    if ways > MOST:
        raise UsageError(
            f"--criterion oracle: {count} of {len(free)} layers can go in {ways:,} ways, each a pass over the text, "
            f"and at most {MOST:,} are tried. Use greedy, or best"
        )
    plans = [Plan(evidence.layers, gone) for gone in combinations(free, count)]
    losses = evidence.ranked(plans)
    said = f"of all {ways:,} ways the one with the lowest loss, {losses.min():.4f} nats a token"
    return Choice(plans[int(losses.argmin())], said, {"median": round(float(sorted(losses)[len(losses) // 2]), 6)})
