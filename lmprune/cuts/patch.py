"""A patch: a linear map of the state behind single layers, which makes up for the layers that are gone there. Pure.

No stock checkpoint can hold one: what reads a state normalises it first, so that only a factor of the whole state can
be folded into weights. It lives in the model that lmprune loads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lmprune.cuts.beside import KEYS, Beside
from lmprune.cuts.plan import spell
from lmprune.cuts.reading import layers_of, mapping_of
from lmprune.errors import RecipeError, shown

_KEYS = ("method", "after", *KEYS)


@dataclass(frozen=True)
class Patch:
    """`Part`: the state x that leaves each layer of ``after`` becomes x + x M, with M from the file beside the recipe.

    Of each such layer L the file holds one tensor, for a state of width d: ``L.change``, M itself, (d, d); or
    ``L.diagonal``, s, (d,), which stands for M = H diag(s - 1) H' with the H of `lmprune.models.hadamard`.

    Attributes:
        method: how the maps were found: a method of ``lmprune heal``.
        after: layers, by the uncut model's numbers, ascending.
    """

    kind: ClassVar[str] = "patch"
    mergekit: ClassVar[bool] = False
    stock: ClassVar[bool] = False
    verb: ClassVar[str] = "adds"
    beside: Beside
    after: tuple[int, ...]
    method: str

    @property
    def needs(self) -> tuple[int, ...]:
        """Layers that must stay."""
        return self.after

    def to_data(self) -> dict[str, Any]:
        """Plain data for the recipe."""
        return {"method": self.method, "after": list(self.after), **self.beside.to_data()}

    def describe(self) -> str:
        """For people: ``a ghost patch after 3,6``."""
        return f"a {self.method} patch after {spell(self.after)}"

    def of_layer(self, layer: int) -> tuple[str, ...]:
        """What changes behind one layer; nothing else depends on this part."""
        return (self.kind, self.beside.sha256) if layer in self.after else ()

    @classmethod
    def read(cls, data: Any, layers: int, where: str, folder: Path | None) -> Patch:
        """From a recipe; errors as `lmprune.cuts.kinds.read_parts`."""
        data = mapping_of(data, _KEYS, where)
        after, method = layers_of(data.get("after"), layers, f"{where}.after", some=True), data.get("method")
        if not isinstance(method, str) or not re.fullmatch(r"[a-z][a-z0-9-]{0,40}", method):
            raise RecipeError(f"{where}.method is {shown(method)}, which is no name of a healing method")
        return cls(Beside.read(data, cls.kind, where, folder), after, method)
