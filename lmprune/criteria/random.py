"""Drop layers drawn at random: what a criterion must beat to be worth its name."""

from __future__ import annotations

import random

from lmprune.criteria.evidence import Choice, Evidence, may_go
from lmprune.cuts.plan import Plan


def choose(count: int, evidence: Evidence) -> Choice:
    """``count`` layers, each as likely as any other."""
    draw = random.Random(f"lmprune-random-{evidence.seed}")
    gone = tuple(sorted(draw.sample(may_go(evidence, count), count)))
    return Choice(Plan(evidence.layers, gone), f"drawn at random with seed {evidence.seed}")
