"""Sublayers: the attention or the MLP of single layers, left out. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lmprune.cuts.plan import Plan, spell
from lmprune.cuts.reading import layers_of, mapping_of
from lmprune.errors import RecipeError, shown

PROJECTIONS: Mapping[str, str] = {"attention": "o_proj", "mlp": "down_proj"}
"""Sublayer -> the usual name of the projection at its end, by which it adds to the state: zeroed, it adds nothing."""
Ends = tuple[tuple[str, ...], tuple[str, ...]]
"""What only the names of the projections hold at the end of attention, and of the MLP."""
USUAL: Ends = (("o_proj",), ("down_proj",))
_END = re.compile(r"[A-Za-z_][\w.]{0,60}", re.ASCII)


@dataclass(frozen=True)
class Sublayers:
    """`Part`: ``attention`` and ``mlp`` are the layers whose attention and whose MLP go, ascending.

    Attributes:
        ends: what their projections are called in this model, once that was looked up (`lmprune.models.sublayers`).
    """

    kind: ClassVar[str] = "sublayers"
    mergekit: ClassVar[bool] = True
    beside: ClassVar[None] = None
    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    ends: Ends | None = field(default=None, compare=False, repr=False)

    def to_data(self) -> dict[str, Any]:
        """Plain data for the recipe; how projections are called only where it is not the usual way."""
        found: dict[str, Any] = {name: list(layers) for name, layers in self._named() if layers}
        if self.ends not in (None, USUAL):
            found["ends"] = {name: list(ends) for name, ends in self._ends().items()}
        return found

    def describe(self) -> str:
        """For people: ``the attention of 3; the MLP of 5,6``."""
        said = {"attention": "attention", "mlp": "MLP"}
        return "; ".join(f"the {said[name]} of {spell(layers)}" for name, layers in self._named() if layers)

    def of_layer(self, layer: int) -> tuple[str, ...]:
        """What goes of one layer; nothing else depends on this part."""
        return tuple(name for name, layers in self._named() if layer in layers)

    def scales(self, layer: int, *, first: bool = False, last: bool = False) -> list[dict[str, Any]]:
        """As mergekit says it: factors of the layer's tensors by what their names hold."""
        return [{"filter": end, "value": 0.0} for name in self.of_layer(layer) for end in self._ends()[name]]

    @classmethod
    def read(cls, data: Any, layers: int, where: str, folder: Path | None = None) -> Sublayers:
        """From a recipe; errors as `lmprune.cuts.kinds.read_parts`."""
        data = dict(mapping_of(data, (*PROJECTIONS, "ends"), where))
        ends = _ends_of(data.pop("ends", {}), f"{where}.ends")
        found = {name: layers_of(numbers, layers, f"{where}.{name}") for name, numbers in data.items()}
        if not any(found.values()):
            raise RecipeError(f"{where} names no layer. Remove it")
        return cls(found.get("attention", ()), found.get("mlp", ()), ends)

    def _ends(self) -> dict[str, tuple[str, ...]]:
        return dict(zip(PROJECTIONS, self.ends or USUAL))

    def _named(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return ("attention", self.attention), ("mlp", self.mlp)


def _ends_of(data: Any, where: str) -> Ends:
    data = mapping_of(data, tuple(PROJECTIONS), where)
    for name, ends in data.items():
        good = isinstance(ends, list) and 0 < len(ends) <= 256 and all(isinstance(end, str) for end in ends)
        if not good or not all(_END.fullmatch(end) for end in ends):
            raise RecipeError(f"{where}.{name} is {shown(ends)}; list what names of projections hold, such as c_proj")
    attention, mlp = (tuple(data.get(name, usual)) for name, usual in zip(PROJECTIONS, USUAL))
    return attention, mlp


def plan_of(layers: int, gone: Iterable[tuple[int, str]]) -> Plan:
    """The plan without these (layer, sublayer) pairs; a layer that loses both goes as a whole.

    >>> plan_of(4, [(1, "mlp"), (2, "attention"), (1, "attention")]).describe()
    'drops 1 of 4 layers: 1; the attention of 2'
    """
    gone = list(gone)
    sets = {name: {layer for layer, other in gone if other == name} for name in PROJECTIONS}
    whole = sets["attention"] & sets["mlp"]
    rest = {name: tuple(sorted(found - whole)) for name, found in sets.items()}
    return Plan(layers, tuple(whole), (Sublayers(rest["attention"], rest["mlp"]),) if any(rest.values()) else ())
