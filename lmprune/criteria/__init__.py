"""The criteria: each chooses which layers to drop. Pure: a profile and numbers in, a plan out.

A criterion is one file with a function ``choose(layers, count, profile) -> Plan`` and one line in `CRITERIA`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lmprune.criteria import angular, deepest
from lmprune.cuts.plan import Plan
from lmprune.errors import UsageError, nearest
from lmprune.profiling.distances import Profile

Choose = Callable[[int, int, "Profile | None"], Plan]


@dataclass(frozen=True)
class Criterion:
    """How layers are chosen; ``needs_profile`` says whether forward passes must have been made first."""

    choose: Choose
    needs_profile: bool


CRITERIA: dict[str, Criterion] = {
    "angular": Criterion(angular.choose, needs_profile=True),
    "deepest": Criterion(deepest.choose, needs_profile=False),
}


def criterion(name: str) -> Criterion:
    """The criterion called ``name``.

    Raises:
        UsageError: there is none.
    """
    if name not in CRITERIA:
        raise UsageError(
            f"--criterion {name!r} does not exist{nearest(name, CRITERIA)}. Choose from {', '.join(CRITERIA)}"
        )
    return CRITERIA[name]
