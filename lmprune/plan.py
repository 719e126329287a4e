"""Which layers stay and which go. Pure: knows nothing about models, files or tensors.

Layers are 0-based and ranges half-open, as in mergekit. The one exception is what people type at
``--layers``: there ``3-5,9`` means the layers 3, 4, 5 and 9, both ends included, as in a print dialogue.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from lmprune.errors import PlanError


@dataclass(frozen=True)
class LayerPlan:
    """A model of ``layers`` layers without those in ``dropped``.

    Raises:
        PlanError: a layer is out of range, named twice, or nothing or everything would be dropped.
    """

    layers: int
    dropped: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise PlanError(f"a model has at least one layer, not {self.layers}")
        object.__setattr__(self, "dropped", tuple(sorted(self.dropped)))
        for before, after in zip(self.dropped, self.dropped[1:]):
            if before == after:
                raise PlanError(f"layer {after} is named twice. Name each layer to drop once")
        outside = [layer for layer in self.dropped if not 0 <= layer < self.layers]
        if outside:
            raise PlanError(
                f"layer {outside[0]} does not exist: the model has layers 0 to {self.layers - 1}. "
                "Layers are counted from 0"
            )
        if len(self.dropped) >= self.layers:
            raise PlanError(
                f"cannot drop all {self.layers} layers: at least one must stay. Drop at most {self.layers - 1}"
            )

    @property
    def kept(self) -> tuple[int, ...]:
        """The layers that stay, ascending."""
        gone = set(self.dropped)
        return tuple(layer for layer in range(self.layers) if layer not in gone)

    def slices(self) -> list[tuple[int, int]]:
        """The kept layers as maximal half-open ranges.

        >>> LayerPlan(8, (3, 4, 5, 6)).slices()
        [(0, 3), (7, 8)]
        """
        return runs(self.kept)

    @property
    def contiguous(self) -> bool:
        """Whether the dropped layers form one block."""
        return len(runs(self.dropped)) == 1

    @classmethod
    def from_kept(cls, layers: int, kept: Iterable[int]) -> LayerPlan:
        """The plan that keeps exactly ``kept``, in ascending order and each once."""
        kept = list(kept)
        for before, after in zip(kept, kept[1:]):
            if after <= before:
                raise PlanError(
                    f"layer {after} comes after layer {before}: a pruned model keeps its layers in order, each once"
                )
        for layer in kept:
            if not 0 <= layer < layers:
                raise PlanError(f"layer {layer} does not exist: the model has layers 0 to {layers - 1}")
        stays = set(kept)
        return cls(layers, tuple(layer for layer in range(layers) if layer not in stays))

    @classmethod
    def from_slices(cls, layers: int, slices: Iterable[tuple[int, int]]) -> LayerPlan:
        """The plan that keeps the given half-open ranges."""
        kept: list[int] = []
        for start, stop in slices:
            if stop <= start:
                raise PlanError(f"the range [{start}, {stop}] is empty: a range keeps start .. stop-1")
            if start < 0 or stop > layers:
                raise PlanError(f"the range [{start}, {stop}] reaches outside the model's layers [0, {layers}]")
            if kept and start <= kept[-1]:
                raise PlanError(f"the range [{start}, {stop}] overlaps the one before it, which ends at {kept[-1] + 1}")
            kept.extend(range(start, stop))
        return cls.from_kept(layers, kept)

    def describe(self) -> str:
        """One line for people: ``drops 4 of 12 layers: 5-8``."""
        return f"drops {len(self.dropped)} of {self.layers} layers: {spell(self.dropped)}"


def runs(layers: Iterable[int]) -> list[tuple[int, int]]:
    """Maximal half-open ranges of an ascending sequence."""
    found: list[tuple[int, int]] = []
    for layer in layers:
        if found and found[-1][1] == layer:
            found[-1] = (found[-1][0], layer + 1)
        else:
            found.append((layer, layer + 1))
    return found


def spell(layers: Iterable[int]) -> str:
    """Layers as people write them, both ends included; `parse_layers` reads it back.

    >>> spell([3, 4, 5, 9])
    '3-5,9'
    """
    return ",".join(str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in runs(layers)) or "none"


def parse_layers(text: str) -> tuple[int, ...]:
    """``3-5,9`` -> (3, 4, 5, 9).

    Raises:
        PlanError: the text is not a list of layers and ranges, or a layer occurs twice.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
        if match is None:
            raise PlanError(f"--layers {text!r}: {part.strip()!r} is neither a layer nor a range. Write it like 3-5,9")
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if last < first:
            raise PlanError(f"--layers {text!r}: the range {part.strip()!r} runs backwards")
        layers.extend(range(first, last + 1))
    repeated = {layer for layer in layers if layers.count(layer) > 1}
    if repeated:
        raise PlanError(f"--layers {text!r}: layer {min(repeated)} is named twice. Ranges must not overlap")
    return tuple(sorted(layers))


def check_count(count: int, layers: int, option: str = "--drop") -> int:
    """``count`` if that many of ``layers`` layers can be dropped."""
    if not 0 < count < layers:
        raise PlanError(f"{option} {count}: this model has {layers} layers, so give 1 to {layers - 1}")
    return count


def count_of_fraction(fraction: float, layers: int) -> int:
    """The number of layers nearest to ``fraction`` of them, at least one short of all and at least one.

    Raises:
        PlanError: the fraction is not between 0 and 1, or it rounds to none or all of the layers.
    """
    if not 0 < fraction < 1:
        raise PlanError(f"--fraction {fraction}: give a share of the layers between 0 and 1, for example 0.25")
    count = round(fraction * layers)
    if not 0 < count < layers:
        raise PlanError(
            f"--fraction {fraction}: of {layers} layers that is {fraction * layers:.2f}, which rounds to {count}. "
            f"Use --drop 1 to {layers - 1}"
        )
    return count
