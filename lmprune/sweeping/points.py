"""The points of a sweep: which cuts, what they are called, and in which order they are measured. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from lmprune.cuts.kinds import read_parts
from lmprune.cuts.plan import MOST_LAYERS, Part, Plan, count_of_fraction, spell
from lmprune.errors import UsageError
from lmprune.settings import QUANTIZATIONS, Quantization

BASELINE = "baseline"
T = TypeVar("T")
STAGES = ("", "int8", "nf4", "repaired", "healed")
"""What becomes of a cut, in the order in which it is measured."""
_NAME = re.compile(rf"{BASELINE}(-int8|-nf4)?|\w[\w.+-]{{0,99}}-\d{{2,5}}(-repaired|-healed|-int8|-nf4)?", re.ASCII)
"""What `point_name` makes. Paths are made of names, so a foreign file must not name anything else."""


@dataclass(frozen=True)
class Point:
    """One model to measure: the base, or a cut of it, as it is, in few bits, repaired by a closed form, or healed.

    Attributes:
        quantization: in how few bits its weights are held; None: as the model has them.
        parts: what a cut that was given by its recipe loses besides whole layers.
    """

    name: str
    criterion: str | None
    layers: int
    dropped: tuple[int, ...]
    healed: bool = False
    repaired: bool = False
    quantization: Quantization | None = None
    parts: tuple[Part, ...] = ()

    @property
    def is_cut(self) -> bool:
        """Whether anything is missing from it."""
        return bool(self.dropped or self.parts)

    @property
    def what(self) -> str:
        """What is missing, for people: ``3 (2,5,7)``, ``narrows the FFN to 96 neurons``."""
        layers = f"{self.n} ({spell(self.dropped)})" if self.n else "" if self.parts else "none"
        return "; ".join(filter(None, [layers, Plan(self.layers, (), self.parts).describe() if self.parts else ""]))

    @property
    def n(self) -> int:
        """Layers dropped."""
        return len(self.dropped)

    @property
    def plan(self) -> Plan | None:
        """The cut; None for the base."""
        return Plan(self.layers, self.dropped, self.parts) if self.is_cut else None

    @property
    def unhealed(self) -> str:
        """The name of the same model as it is: before repair and healing, and not in few bits."""
        return self.name.removesuffix(f"-{self.made}")

    @property
    def made(self) -> str:
        """What became of the cut: healed, repaired, few bits, or nothing."""
        return "healed" if self.healed else "repaired" if self.repaired else self.quantization or ""

    @property
    def folder(self) -> bool:
        """Whether it is a checkpoint of its own: the others are the base and its cuts, in however many bits."""
        return self.healed or self.repaired

    @property
    def stage(self) -> int:
        """Cuts come first, then those in few bits, then repaired ones, then healed ones."""
        return STAGES.index(self.made)

    def made_into(self, made: str) -> Point:
        """The same cut repaired or healed, or the same model in so few bits."""
        few = next((kind for kind in QUANTIZATIONS if kind == made), None)
        name, healed, repaired = f"{self.name}-{made}", made == "healed", made == "repaired"
        return replace(self, name=name, healed=healed, repaired=repaired, quantization=few)

    def to_data(self) -> dict[str, Any]:
        """Plain data for ``sweep.json``."""
        data = {name: value for name, value in vars(self).items() if name != "parts"} | {"dropped": list(self.dropped)}
        return data | ({"parts": {part.kind: part.to_data() for part in self.parts}} if self.parts else {})

    @classmethod
    def from_data(cls, data: dict[str, Any], recipes: Path | None = None) -> Point:
        """Read `to_data`'s form, of which nothing is trusted; ``recipes`` is the folder of the points' recipes.

        Raises:
            TypeError, KeyError, ValueError: it is no point of a sweep.
            RecipeError: its parts are none.
        """
        name, criterion, layers, dropped = data["name"], data["criterion"], data["layers"], data["dropped"]
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{str(name)[:40]!r} is no point's name")
        if any(type(number) is not int for number in (layers, *dropped)) or not isinstance(criterion, str | None):
            raise ValueError(f"{name} has a criterion or layers of another type")
        if not 0 < layers <= MOST_LAYERS:
            raise ValueError(f"{name} is of more layers than any model has, or of none")
        if any(not 0 <= layer < layers for layer in dropped) or list(dropped) != sorted(set(dropped)):
            raise ValueError(f"{name} drops layers that are not there, or twice")
        said = [data.get(made, False) is name.endswith(f"-{made}") for made in ("healed", "repaired")]
        said += [(data.get("quantization") == kind) is name.endswith(f"-{kind}") for kind in QUANTIZATIONS]
        parts = read_parts(data.get("parts"), layers, name, recipes)
        point = cls(**{**data, "dropped": tuple(dropped), "parts": parts})
        if (
            point.is_cut == (point.unhealed == BASELINE)
            or point.quantization not in (None, *QUANTIZATIONS)
            or not all(said)
        ):
            raise ValueError(f"{name} says otherwise than its name")
        return point


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
    """The base first, then cuts, then those of each stage; sizes so that a curve is usable early."""
    order: list[Point] = [point for point in points if not point.is_cut]
    for stage in range(len(STAGES)):
        cuts = [point for point in points if point.is_cut and point.stage == stage]
        for n in early_first(sorted({point.n for point in cuts})):
            order += [point for point in cuts if point.n == n]
    return order
