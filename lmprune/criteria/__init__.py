"""The criteria: each chooses what to cut. Pure: evidence and a number in, a choice out.

A criterion is one file with a function ``choose(count, evidence) -> Choice`` and one line in `CRITERIA`; other packages
add theirs by an entry point in the group ``lmprune.criteria`` that names such a file. It may ask for `Evidence`.
"""

from __future__ import annotations

from typing import Protocol

from lmprune.criteria import (
    angular,
    best,
    block_influence,
    block_pruner,
    deepest,
    evolve,
    finercut,
    greedy,
    greedy_angular,
    greedy_influence,
    magnitude,
    one_shot,
    oracle,
    random,
    segment,
    taylor,
)
from lmprune.criteria.evidence import Choice, Evidence
from lmprune.plugins import Table

__all__ = ["CRITERIA", "Choice", "Criterion", "Evidence"]


class Criterion(Protocol):
    """A way to choose. A module with such a function is one."""

    def choose(self, count: int, evidence: Evidence) -> Choice:
        """Which ``count`` layers go, from 1 to one less than there are, and why."""


OWN: dict[str, Criterion] = {
    "angular": angular,
    "deepest": deepest,
    "block-influence": block_influence,
    "one-shot": one_shot,
    "greedy": greedy,
    "greedy-angular": greedy_angular,
    "greedy-influence": greedy_influence,
    "segment": segment,
    "taylor": taylor,
    "magnitude": magnitude,
    "evolve": evolve,
    "finercut": finercut,
    "block-pruner": block_pruner,
    "random": random,
    "oracle": oracle,
    "best": best,
}
CRITERIA: Table[Criterion] = Table("--criterion", "lmprune.criteria", OWN, needs=("choose",))
