"""The points of a sweep: which cuts, what they are called, and in which order they are measured. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from lmprune.cuts.plan import Plan, count_of_fraction
from lmprune.errors import UsageError

BASELINE = "baseline"
T = TypeVar("T")
_NAME = re.compile(rf"{BASELINE}|\w[\w.+-]{{0,99}}-\d{{2,5}}(-repaired|-healed)?", re.ASCII)
"""What `point_name` makes. Paths are made of names, so a foreign file must not name anything else."""


@dataclass(frozen=True)
class Point:
    """One model to measure: the base, or a cut of it, as it is, repaired by a closed form, or healed by training."""

    name: str
    criterion: str | None
    layers: int
    dropped: tuple[int, ...]
    healed: bool = False
    repaired: bool = False

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
        """The name of the same cut before repair and healing."""
        return self.name.removesuffix(f"-{self.made}")

    @property
    def made(self) -> str:
        """What became of the cut: healed, repaired, or nothing."""
        return "healed" if self.healed else "repaired" if self.repaired else ""

    @property
    def stage(self) -> int:
        """Cuts come first, then repaired ones, then healed ones."""
        return ("", "repaired", "healed").index(self.made)

    def made_into(self, made: str) -> Point:
        """The same cut repaired or healed."""
        return replace(self, name=f"{self.name}-{made}", healed=made == "healed", repaired=made == "repaired")

    def to_data(self) -> dict[str, Any]:
        """Plain data for ``sweep.json``."""
        return asdict(self) | {"dropped": list(self.dropped)}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Point:
        """Read `to_data`'s form, of which nothing is trusted.

        Raises:
            TypeError, KeyError, ValueError: it is no point of a sweep.
        """
        name, criterion, layers, dropped = data["name"], data["criterion"], data["layers"], data["dropped"]
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{str(name)[:40]!r} is no point's name")
        if any(type(number) is not int for number in (layers, *dropped)) or not isinstance(criterion, str | None):
            raise ValueError(f"{name} has a criterion or layers of another type")
        if any(not 0 <= layer < layers for layer in dropped) or list(dropped) != sorted(set(dropped)):
            raise ValueError(f"{name} drops layers that are not there, or twice")
        said = [data.get(made, False) is name.endswith(f"-{made}") for made in ("healed", "repaired")]
        if bool(dropped) == (name == BASELINE) or not all(said):
            raise ValueError(f"{name} says otherwise than its name")
        return cls(**{**data, "dropped": tuple(dropped)})


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
    """The base first, then cuts, then repaired ones, then healed ones; sizes so that a curve is usable early."""
    order: list[Point] = [point for point in points if not point.n]
    for stage in range(3):
        cuts = [point for point in points if point.n and point.stage == stage]
        for n in early_first(sorted({point.n for point in cuts})):
            order += [point for point in cuts if point.n == n]
    return order
