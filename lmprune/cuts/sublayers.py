"""Sublayers: the attention or the MLP of single layers, left out. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lmprune.cuts.plan import Plan, spell
from lmprune.cuts.reading import layers_of, mapping_of
from lmprune.errors import RecipeError

PROJECTIONS: Mapping[str, str] = {"attention": "o_proj", "mlp": "down_proj"}
"""Sublayer -> the projection at its end, by which it adds to the state: zeroed, it adds nothing."""


@dataclass(frozen=True)
class Sublayers:
    """`Part`: ``attention`` and ``mlp`` are the layers whose attention and whose MLP go, ascending."""

    kind: ClassVar[str] = "sublayers"
    mergekit: ClassVar[bool] = True
    beside: ClassVar[None] = None
    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()

    def to_data(self) -> dict[str, list[int]]:
        """Plain data for the recipe."""
        return {name: list(layers) for name, layers in self._named() if layers}

    def describe(self) -> str:
        """For people: ``the attention of 3; the MLP of 5,6``."""
        said = {"attention": "attention", "mlp": "MLP"}
        return "; ".join(f"the {said[name]} of {spell(layers)}" for name, layers in self._named() if layers)

    def of_layer(self, layer: int) -> tuple[str, ...]:
        """What goes of one layer; nothing else depends on this part."""
        return tuple(name for name, layers in self._named() if layer in layers)

    def scales(self, layer: int, *, first: bool = False, last: bool = False) -> list[dict[str, Any]]:
        """As mergekit says it: factors of the layer's tensors by what their names hold."""
        return [{"filter": PROJECTIONS[name], "value": 0.0} for name in self.of_layer(layer)]

    @classmethod
    def read(cls, data: Any, layers: int, where: str, folder: Path | None = None) -> Sublayers:
        """From a recipe; errors as `lmprune.cuts.kinds.read_parts`."""
        data = mapping_of(data, tuple(PROJECTIONS), where)
        found = {name: layers_of(numbers, layers, f"{where}.{name}") for name, numbers in data.items()}
        if not any(found.values()):
            raise RecipeError(f"{where} names no layer. Remove it")
        return cls(**found)

    def _named(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return ("attention", self.attention), ("mlp", self.mlp)


def plan_of(layers: int, gone: Iterable[tuple[int, str]]) -> Plan:
    """The plan without these (layer, sublayer) pairs; a layer that loses both goes as a whole.

    >>> plan_of(4, [(1, "mlp"), (2, "attention"), (1, "attention")]).describe()
    'drops 1 of 4 layers: 1; the attention of 2'
    """
    gone = list(gone)
    sets = {name: {layer for layer, other in gone if other == name} for name in PROJECTIONS}
    whole = sets["attention"] & sets["mlp"]
    rest = {name: tuple(sorted(found - whole)) for name, found in sets.items()}
    return Plan(layers, tuple(whole), (Sublayers(**rest),) if any(rest.values()) else ())
