"""A budget, and the shape of a model that is searched for under it. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lmprune.cuts.plan import spell
from lmprune.errors import UsageError, sized
from lmprune.settings import option

KINDS = ("depth", "ffn", "slice", "groups")
"""What may be cut: whole layers, neurons, the hidden size, key-value groups."""
USUAL = ("depth", "ffn", "slice")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True)
class BudgetSettings:
    """How small or fast the model should become, and by what."""

    params: float | None = option(
        None, "Share of the parameters that may stay, embeddings not counted: 0.75.", metavar="F"
    )
    size: str | None = option(None, "Bytes that all weights may take: 4GB.", metavar="BYTES")
    speed: str | None = option(None, "Times as fast, measured here: 1.3x.", metavar="X")
    kinds: str | None = option(
        None,
        f"With a budget: what is cut, of {','.join(KINDS)}. Default: {','.join(USUAL)}, as far as the model allows.",
        metavar="K,...",
        flag="--with",
    )
    multiple: int | None = option(
        None,
        "With a budget: neurons and hidden size become multiples of it. Default: 64, or less for small models.",
        metavar="N",
    )
    neurons: str = option(
        "ffn", "With a budget: how neurons are chosen; ffn is least squares, others are controls.", metavar="M"
    )
    fit_tokens: int = option(8192, "With a budget: tokens that each trial is refitted on.", metavar="N")
    steps: int = option(
        6, "With a budget: moves in which it is reached, about. Fewer take fewer trials and see less.", metavar="N"
    )

    def check(self) -> None:
        """Make sure that what is counted is counted from 1.

        Raises:
            UsageError: naming the first that is not.
        """
        for name in ("multiple", "fit_tokens", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: give a number from 1")

    @property
    def asked(self) -> bool:
        """Whether there is a budget."""
        return any(value is not None for value in (self.params, self.size, self.speed))

    @property
    def named(self) -> tuple[str, ...] | None:
        """The kinds that were asked for.

        Raises:
            UsageError: there is no such kind.
        """
        if self.kinds is None:
            return None
        words = tuple(word.strip() for word in self.kinds.split(","))
        for word in words:
            if word not in KINDS:
                raise UsageError(f"--with {self.kinds!r}: {word!r} is nothing to cut. Give some of {','.join(KINDS)}")
        return words


@dataclass(frozen=True)
class Budget:
    """What may be left at most.

    Attributes:
        what: ``params``, ``size`` or ``speed``.
        value: a share of the parameters without embeddings; bytes; or times as fast.
    """

    what: str
    value: float

    @classmethod
    def of(cls, settings: BudgetSettings) -> Budget:
        """The budget that was asked for.

        Raises:
            UsageError: it is none, or several are given.
        """
        given = {name: getattr(settings, name) for name in ("params", "size", "speed")}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            raise UsageError(f"give one of --params, --size and --speed, not {' and '.join(given) or 'none'}")
        ((what, value),) = given.items()
        if what == "params":
            if not 0 < value < 1:
                raise UsageError(f"--params {value}: give a share of the parameters between 0 and 1, for example 0.75")
            return cls(what, float(value))
        if what == "size":
            return cls(what, float(_bytes(value)))
        return cls(what, _times(value))

    def describe(self) -> str:
        """For people."""
        if self.what == "params":
            return f"{self.value:.1%} of the parameters without embeddings"
        return sized(self.value) if self.what == "size" else f"{self.value:g} times as fast"


def _bytes(text: str) -> int:
    """``4GB`` -> 4000000000."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?b?)\s*", text.lower())
    if match is None or match[2] not in (*_UNITS, "b") or float(match[1]) <= 0:
        raise UsageError(f"--size {text!r} is no size. Write it like 4GB or 600MB")
    return round(float(match[1]) * _UNITS.get(match[2], 1))


def _times(text: str) -> float:
    """``1.3x`` -> 1.3."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*x?\s*", text.lower())
    if match is None or not float(match[1]) > 1:
        raise UsageError(f"--speed {text!r}: give how many times as fast, above 1, as in 1.3x")
    return float(match[1])


@dataclass(frozen=True, order=True)
class Shape:
    """What is left of a model.

    Attributes:
        dropped: layers that are gone, ascending.
        ffn, hidden, groups: neurons of an MLP, the hidden size, key-value groups; 0 where the model has no such number.
    """

    dropped: tuple[int, ...]
    ffn: int
    hidden: int
    groups: int

    def without(self, layer: int) -> Shape:
        """With one layer less."""
        return replace(self, dropped=tuple(sorted((*self.dropped, layer))))

    def to(self, axis: str, size: int) -> Shape:
        """With another ``ffn``, ``hidden`` or ``groups``."""
        sizes: Mapping[str, Any] = {axis: size}
        return replace(self, **sizes)

    def describe(self, whole: Shape) -> str:
        """For people: ``drops 4,7; FFN 208 of 320``."""
        said = [f"drops {spell(self.dropped)}"] if self.dropped else []
        names = {"ffn": "FFN", "hidden": "hidden size", "groups": "key-value groups"}
        for axis, name in names.items():
            if getattr(self, axis) != getattr(whole, axis):
                said.append(f"{name} {getattr(self, axis)} of {getattr(whole, axis)}")
        return "; ".join(said) or "the whole model"


AXES: Mapping[str, str] = {"ffn": "ffn", "slice": "hidden", "groups": "groups"}
"""Kind -> the size that it cuts."""


def usual_multiple(shape: Shape) -> int:
    """64, or the largest power of two that is at most a fortieth of the smaller of FFN and hidden size.

    >>> usual_multiple(Shape((), 320, 128, 4)), usual_multiple(Shape((), 11008, 4096, 32))
    (2, 64)
    """
    smallest = min(size for size in (shape.ffn, shape.hidden) if size) if shape.ffn or shape.hidden else 64
    multiple = 64
    while multiple > max(1, smallest / 40):
        multiple //= 2
    return multiple
