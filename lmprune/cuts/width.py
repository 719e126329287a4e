"""Width: fewer neurons in every MLP, fewer key-value groups in every attention, a smaller hidden size. Pure.

Of a stock checkpoint one number says the width of all layers, so each is uniform over the layers that are kept. Which
neurons and groups stay, and into which directions the hidden state is turned, stands in a file beside the recipe:

- ``neurons.{layer}`` (n,), int32, ascending: the neurons kept of that layer's MLP; (experts, n) where it has experts;
- ``shared.{layer}`` (m,), likewise of its shared expert, where the same number of the config says its width;
- ``groups.{layer}`` (g,), int32, ascending: the key-value groups kept, each with its query heads;
- ``rotation`` (d, k), floating point: orthonormal columns, of which the first k directions of the stream are made.

Layers have the uncut model's numbers. Layers that are dropped need no entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lmprune.cuts.beside import KEYS, Beside
from lmprune.cuts.reading import mapping_of
from lmprune.errors import RecipeError, shown

SIZES = ("ffn", "hidden", "groups")
MOST = 1 << 24


@dataclass(frozen=True)
class Width:
    """`Part`: how wide the model is afterwards, where None leaves it as it is.

    Attributes:
        beside: the file of what stays; `lmprune.models.width` reads and makes it.
        ffn: neurons of each MLP, or of each expert where there are experts; dense layers among those stay whole.
        hidden: the hidden size.
        groups: key-value groups of each layer.
    """

    kind: ClassVar[str] = "width"
    mergekit: ClassVar[bool] = False
    verb: ClassVar[str] = "narrows"
    beside: Beside
    ffn: int | None = None
    hidden: int | None = None
    groups: int | None = None

    def to_data(self) -> dict[str, Any]:
        """Plain data for the recipe."""
        return {**{name: size for name, size in self._named() if size is not None}, **self.beside.to_data()}

    def describe(self) -> str:
        """For people: ``the FFN to 208 neurons, the hidden size to 96``."""
        return ", ".join(self.lines())

    def lines(self) -> list[str]:
        """The same, each size by itself."""
        many = "s" if self.groups != 1 else ""
        said = {
            "ffn": "the FFN to {} neurons",
            "hidden": "the hidden size to {}",
            "groups": f"attention to {{}} key-value group{many}",
        }
        return [said[name].format(size) for name, size in self._named() if size is not None]

    @classmethod
    def read(cls, data: Any, layers: int, where: str, folder: Path | None) -> Width:
        """From a recipe in ``folder``; errors as `lmprune.cuts.kinds.read_parts`."""
        data = mapping_of(data, (*SIZES, *KEYS), where)
        sizes = {name: data[name] for name in SIZES if data.get(name) is not None}
        for name, size in sizes.items():
            if type(size) is not int or not 0 < size <= MOST:
                raise RecipeError(f"{where}.{name} is {shown(size)}; give a whole number above 0")
        if not sizes:
            raise RecipeError(f"{where} names no size: give ffn, hidden or groups, or remove it")
        return cls(Beside.read(data, cls.kind, where, folder), **sizes)

    @property
    def computed(self) -> bool:
        """Whether weights are computed, and not only left out."""
        return self.hidden is not None

    def _named(self) -> tuple[tuple[str, int | None], ...]:
        return tuple((name, getattr(self, name)) for name in SIZES)
