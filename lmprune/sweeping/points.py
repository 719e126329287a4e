"""The points of a sweep: which cuts, what they are called, and in which order they are measured. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from lmprune.cuts.plan import Plan, count_of_fraction
from lmprune.errors import UsageError

BASELINE = "baseline"
T = TypeVar("T")


@dataclass(frozen=True)
class Point:
    """One model to measure: the base, or a cut of it, healed or not."""

    name: str
    criterion: str | None
    layers: int
    dropped: tuple[int, ...]
    healed: bool = False

    @property
    def n(self) -> int:
        """Layers dropped."""
        return len(self.dropped)

    @property
    def plan(self) -> Plan | None:
        """The cut; None for the base."""
        return Plan(self.layers, self.dropped) if self.dropped else None

    @property
    def unhealed(self) -> str:
        """The name of the same cut before healing."""
        return self.name.removesuffix("-healed")

    def to_data(self) -> dict[str, Any]:
        """Plain data for ``sweep.json``."""
        return asdict(self) | {"dropped": list(self.dropped)}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Point:
        """Read `to_data`'s form."""
        return cls(**{**data, "dropped": tuple(data["dropped"])})


def counts(shares: Sequence[float], layers: int) -> list[int]:
    """Layers to drop for each share.

    Raises:
        UsageError: two shares give the same number, or one gives none or all of the layers.
    """
    found: dict[int, float] = {}
    for share in shares:
        n = count_of_fraction(share, layers)
        if n in found:
            raise UsageError(f"--fractions {found[n]:g},{share:g}: both are {n} of {layers} layers. Leave one out")
        found[n] = share
    return sorted(found)


def point_name(criterion: str, n: int) -> str:
    """
    >>> point_name("angular", 3)
    'angular-03'
    """
    return f"{criterion}-{n:02d}"


def early_first(items: Sequence[T]) -> list[T]:
    """The middle, then the middles of both halves, and so on: any beginning covers the whole range.

    >>> early_first([1, 2, 3, 4, 5])
    [3, 2, 5, 1, 4]
    """
    order: list[T] = []
    queue = [list(items)]
    while queue:
        part = queue.pop(0)
        if part:
            middle = len(part) // 2
            order.append(part[middle])
            queue += [part[:middle], part[middle + 1 :]]
    return order


def in_order(points: Sequence[Point]) -> list[Point]:
    """The base first, then unhealed cuts, then healed ones; sizes so that a curve is usable early."""
    order: list[Point] = [point for point in points if not point.n]
    for healed in (False, True):
        cuts = [point for point in points if point.n and point.healed == healed]
        for n in early_first(sorted({point.n for point in cuts})):
            order += [point for point in cuts if point.n == n]
    return order
