"""The criteria: each chooses what to cut. Pure: evidence and a number in, a choice out.

A criterion is one file with a function ``choose(count, evidence) -> Choice`` and one line in `CRITERIA`; other packages
add theirs by an entry point in the group ``lmprune.criteria`` that names such a file. It may ask for `Evidence`.
"""

from __future__ import annotations

from typing import Protocol

from lmprune.criteria import angular, deepest
from lmprune.criteria.evidence import Choice, Evidence
from lmprune.plugins import Table

__all__ = ["CRITERIA", "Choice", "Criterion", "Evidence"]


class Criterion(Protocol):
    """A way to choose. A module with such a function is one."""

    def choose(self, count: int, evidence: Evidence) -> Choice:
        """Which ``count`` layers go, from 1 to one less than there are, and why."""


CRITERIA: Table[Criterion] = Table(
    "--criterion", "lmprune.criteria", {"angular": angular, "deepest": deepest}, needs=("choose",)
)
