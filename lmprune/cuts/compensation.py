"""Magnitude compensation: the state that enters a layer after a cut is multiplied, by all that writes it. Pure.

The layers that are gone made the state larger. To mergekit this is ``scale`` filters, which plain mergekit runs; how
the factors are found stands in `lmprune.healing.scaling`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lmprune.cuts.plan import spell
from lmprune.cuts.reading import layers_of, mapping_of
from lmprune.errors import RecipeError, shown

_KEYS = ("before", "factors", "layers", "embeddings", "norms")
_MOST = 1e6


@dataclass(frozen=True)
class Compensation:
    """`Part`: tensors that are multiplied, so that states at cuts are.

    Attributes:
        before: the layers after each cut, by the uncut model's numbers, ascending.
        factors: what the state that enters each of them is multiplied by.
        layers: what a layer writes with, as it is called within a layer: ``mlp.down_proj.weight``. It is multiplied by
            the factors of all cuts behind its layer.
        embeddings: what writes the state that enters the first layer, multiplied by all factors.
        norms: the last norm, divided by all of them, where the embeddings are the head as well.
    """

    kind: ClassVar[str] = "compensation"
    mergekit: ClassVar[bool] = True
    beside: ClassVar[None] = None
    verb: ClassVar[str] = "scales"
    before: tuple[int, ...]
    factors: tuple[float, ...]
    layers: tuple[str, ...]
    embeddings: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[int, ...]:
        """Layers that must stay."""
        return self.before

    @property
    def everywhere(self) -> float:
        """The product of all factors."""
        return math.prod(self.factors)

    def of(self, layer: int) -> float:
        """What that layer's writers are multiplied by."""
        return math.prod(factor for place, factor in zip(self.before, self.factors) if place > layer)

    def to_data(self) -> dict[str, Any]:
        """Plain data for the recipe."""
        return {key: list(getattr(self, key)) for key in _KEYS if getattr(self, key)}

    def describe(self) -> str:
        """For people: ``the state before 5,8 by 1.08,1.21``."""
        return f"the state before {spell(self.before)} by {','.join(f'{factor:.4g}' for factor in self.factors)}"

    def scales(self, layer: int, *, first: bool, last: bool) -> list[dict[str, Any]]:
        """As mergekit says it: of the slice that holds the layer, which may be the first or the last that stays.

        mergekit takes the embeddings' factors from the first slice and the last norm's from the last.
        """
        found: list[tuple[str, float]] = [(name, self.of(layer)) for name in self.layers if self.of(layer) != 1]
        if first:
            found += [(name, self.everywhere) for name in self.embeddings]
        if last:
            found += [(name, 1 / self.everywhere) for name in self.norms]
        return [{"filter": name, "value": value} for name, value in found]

    @classmethod
    def read(cls, data: Any, layers: int, where: str, folder: Path | None = None) -> Compensation:
        """From a recipe; errors as `lmprune.cuts.kinds.read_parts`."""
        data = mapping_of(data, _KEYS, where)
        before, factors = layers_of(data.get("before"), layers, f"{where}.before", some=True), data.get("factors")
        good = isinstance(factors, list) and all(type(n) is float and 1 / _MOST <= n <= _MOST for n in factors)
        if not isinstance(factors, list) or not good or len(factors) != len(before):
            raise RecipeError(f"{where}.factors is {shown(factors)}; give a number above 0 for each layer of before")
        names = {key: _names(data.get(key, []), f"{where}.{key}") for key in _KEYS[2:]}
        if not names["layers"]:
            raise RecipeError(f"{where}.layers is empty; name what a layer writes with")
        return cls(before, tuple(factors), **names)


def _names(value: Any, where: str) -> tuple[str, ...]:
    good = isinstance(value, list) and len(value) <= 16 and all(isinstance(name, str) for name in value)
    if not good or not all(re.fullmatch(r"[A-Za-z_][\w.]{0,120}", name, re.ASCII) for name in value):
        raise RecipeError(f"{where} is {shown(value)}; list the names of tensors")
    return tuple(value)


def scales_of(parts: Sequence[Any], layer: int, *, first: bool, last: bool) -> list[dict[str, Any]]:
    """The ``scale`` filters of all parts for a slice of one layer, the default behind them; none where none is due."""
    found = [scale for part in parts if hasattr(part, "scales") for scale in part.scales(layer, first=first, last=last)]
    return [*found, {"value": 1.0}] if found else []
