"""Drop layers drawn at random: what a criterion must beat to be worth its name."""

from __future__ import annotations

import random

from lmprune.criteria.evidence import Choice, Evidence, may_go
from lmprune.cuts.plan import Plan

READS_TEXT = False
"""Whether calibration text, or a profile of it, is read."""


def draw(count: int, evidence: Evidence, seed: int) -> tuple[int, ...]:
    """``count`` layers, each as likely as any other, ascending."""
    generator = random.Random(f"lmprune-random-{seed}")
    return tuple(sorted(generator.sample(may_go(evidence, count), count)))


def choose(count: int, evidence: Evidence) -> Choice:
    """One draw by the evidence's seed."""
    plan = Plan(evidence.layers, draw(count, evidence, evidence.seed))
    return Choice(plan, f"drawn at random with seed {evidence.seed}")
