"""Search by evolution: exchange a few dropped layers for kept ones, keep the best, and go on.

EvoPress, Sieberling et al. 2024, arXiv 2410.14649: a (1 + lambda) search at a fixed number of dropped layers. The best
of 64 random sets is the first parent; in each of n (L - n) / 1.5 generations, 32 children differ from the parent by
the lesser of two draws from 1 to 3 exchanges, and the best of them and the parent is the next parent. It departs from
the paper in how that one is found: by a race over all samples, where the paper has steps of fixed numbers of tokens;
and only whole layers go.
"""

from __future__ import annotations

import random
from math import comb

from lmprune.criteria.evidence import Choice, Evidence, may_go
from lmprune.cuts.plan import Plan

OBJECTIVE = "kl"
"""The paper's."""
FIRST, CHILDREN, EXCHANGES = 64, 32, 3


def choose(count: int, evidence: Evidence) -> Choice:
    """The best ``count`` layers that are found; the same seed finds the same."""
    free = may_go(evidence, count)
    rng = random.Random(f"lmprune-evolve-{evidence.seed}")
    ways = comb(len(free), count)
    first: dict[tuple[int, ...], None] = {}
    while len(first) < min(FIRST, ways):
        first[tuple(sorted(rng.sample(free, count)))] = None
    parent, cost = _best([*first], evidence)
    generations = int(count * (evidence.layers - count) / 1.5) if ways > len(first) else 0
    changed = 0
    for generation in range(1, generations + 1):
        children = dict.fromkeys(_child(parent, free, rng) for _ in range(CHILDREN))
        best, cost = _best([*dict.fromkeys([parent, *children])], evidence)
        changed, parent = (changed, parent) if best == parent else (generation, best)
    said = f"the best of {generations} generations, found in number {changed}: {cost:.4f} nats a token"
    details = {"generations": generations, "found": changed, "seed": evidence.seed}
    return Choice(Plan(evidence.layers, parent), said, details)


def _best(sets: list[tuple[int, ...]], evidence: Evidence) -> tuple[tuple[int, ...], float]:
    costs = evidence.ranked([Plan(evidence.layers, gone) for gone in sets])
    return sets[int(costs.argmin())], float(costs.min())


def _child(parent: tuple[int, ...], free: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
    """The parent with some dropped layers exchanged for kept ones, never back."""
    out, into = sorted(parent), sorted(set(free) - set(parent))
    number = min(rng.randint(1, EXCHANGES), rng.randint(1, EXCHANGES), len(out), len(into))
    return tuple(sorted((set(parent) - set(rng.sample(out, number))) | set(rng.sample(into, number))))
