"""What is cut from a model, as plain data. Knows nothing about models, files or tensors.

A plan has kinds. Whole layers, which mergekit's slices say, are the plan's own; every other kind (a layer's attention
or MLP, neurons, the hidden size) is a `Part`, one class in one file and one line in `lmprune.cuts.kinds`. What a kind
does to a config, to tensors and to a live model is said by `lmprune.models.carrying`.

Layers are 0-based and ranges half-open, as in mergekit. The one exception is what people type at
``--layers``: there ``3-5,9`` means the layers 3, 4, 5 and 9, both ends included, as in a print dialogue.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

from lmprune.cuts.beside import Beside
from lmprune.errors import PlanError, UsageError, shown

MOST_LAYERS = 10_000
"""Far above any model's, and small enough to make lists of."""


class Part(Protocol):
    """What a plan cuts besides whole layers: one frozen, hashable class for each kind.

    Attributes:
        kind: its name in recipes, under ``lmprune: parts:``, and in `lmprune.cuts.kinds`.
        mergekit: whether plain mergekit can express it. A recipe with a part that it cannot says ``merge_method:
            lmprune``, so that mergekit refuses it instead of writing the uncut model.
        beside: the file of tensors beside the recipe; None where the part needs none. A kind that needs one has it as
            a field of this name.

    What a kind may say besides: ``of_layer(layer)``, what it cuts of one layer, where the others stay as they are;
    ``needs``, layers that must not be dropped; ``stock = False``, that no stock checkpoint can hold it; ``computed``,
    that it computes weights; ``verb``, where it does something else than to drop.
    """

    kind: ClassVar[str]
    mergekit: ClassVar[bool]

    @property
    def beside(self) -> Beside | None: ...

    def to_data(self) -> Any:
        """Plain data for the recipe; the kind's ``read`` takes it back."""

    def describe(self) -> str:
        """What goes, for people: ``the MLP of layers 3,5``; a kind that drops nothing has its own ``verb``."""


@dataclass(frozen=True)
class Plan:
    """A model of ``layers`` layers without those in ``dropped``, and without what ``parts`` cut.

    Layers have the uncut model's numbers everywhere, in ``parts`` too.

    Raises:
        PlanError: a layer is out of range, named twice, or nothing or everything would be dropped.
    """

    layers: int
    dropped: tuple[int, ...] = ()
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.layers <= MOST_LAYERS:
            raise PlanError(f"a model has 1 to {MOST_LAYERS} layers, not {shown(self.layers)}")
        object.__setattr__(self, "dropped", tuple(sorted(self.dropped)))
        for before, after in zip(self.dropped, self.dropped[1:]):
            if before == after:
                raise PlanError(f"layer {shown(after)} is named twice. Name each layer to drop once")
        outside = [layer for layer in self.dropped if not 0 <= layer < self.layers]
        if outside:
            raise PlanError(
                f"layer {shown(outside[0])} does not exist: the model has layers 0 to {self.layers - 1}. "
                "Layers are counted from 0"
            )
        if len(self.dropped) >= self.layers:
            raise PlanError(
                f"cannot drop all {self.layers} layers: at least one must stay. Drop at most {self.layers - 1}"
            )
        for part in self.parts:
            if gone := sorted(set(getattr(part, "needs", ())) & set(self.dropped)):
                raise PlanError(
                    f"layer {gone[0]} is dropped, and {part.describe()} needs it. Protect it, or leave one out"
                )

    @property
    def kept(self) -> tuple[int, ...]:
        """The layers that stay, ascending."""
        gone = set(self.dropped)
        return tuple(layer for layer in range(self.layers) if layer not in gone)

    @property
    def needed(self) -> frozenset[int]:
        """Places of layers among those that stay which a further cut must leave, for a part needs them."""
        needed = {layer for part in self.parts for layer in getattr(part, "needs", ())}
        return frozenset(place for place, layer in enumerate(self.kept) if layer in needed)

    def slices(self) -> list[tuple[int, int]]:
        """The kept layers as maximal half-open ranges.

        >>> Plan(8, (3, 4, 5, 6)).slices()
        [(0, 3), (7, 8)]
        """
        return runs(self.kept)

    @classmethod
    def from_kept(cls, layers: int, kept: Iterable[int]) -> Plan:
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
    def from_slices(cls, layers: int, slices: Iterable[tuple[int, int]]) -> Plan:
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

    def then(self, next: Plan) -> Plan:
        """This plan, and ``next`` on what it leaves, as one plan of the uncut model.

        >>> Plan(8, (0, 1)).then(Plan(6, (0,))).dropped
        (0, 1, 2)
        """
        assert next.layers == len(self.kept), "a plan follows another on the layers that are left"
        if next.parts:
            raise PlanError("a cut of more than whole layers cannot follow another. Prune first, then cut again")
        return Plan(self.layers, (*self.dropped, *(self.kept[layer] for layer in next.dropped)), self.parts)

    def within(self, base: Plan) -> Plan:
        """What this plan drops besides ``base``, as a plan of what ``base`` leaves.

        >>> Plan(8, (0, 1, 2)).within(Plan(8, (0, 1)))
        Plan(layers=6, dropped=(0,), parts=())
        """
        assert {*base.dropped} <= {*self.dropped} and base.parts == self.parts, "it drops what is gone already"
        return Plan(len(base.kept), tuple(i for i, layer in enumerate(base.kept) if layer in self.dropped))

    def describe(self) -> str:
        """One line for people: ``drops 4 of 12 layers: 5-8``."""
        said: dict[str, list[str]] = {}
        if self.dropped:
            said["drops"] = [f"{len(self.dropped)} of {self.layers} layers: {spell(self.dropped)}"]
        for part in self.parts:
            said.setdefault(getattr(part, "verb", "drops"), []).append(part.describe())
        return "; ".join(f"{verb} {'; '.join(what)}" for verb, what in said.items()) or "drops nothing"


def is_stock(part: Part) -> bool:
    """Whether a stock checkpoint can hold what the part does."""
    return getattr(part, "stock", True)


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
    layers: set[int] = set()
    said = f"--layers {shown(text)}"
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part, re.ASCII)
        if match is None:
            raise PlanError(f"{said}: {shown(part.strip())} is neither a layer nor a range. Write it like 3-5,9")
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if last < first:
            raise PlanError(f"{said}: the range {shown(part.strip())} runs backwards")
        if last >= MOST_LAYERS:
            raise PlanError(f"{said}: no model has a layer {last}")
        new = set(range(first, last + 1))
        if repeated := layers & new:
            raise PlanError(f"{said}: layer {min(repeated)} is named twice. Ranges must not overlap")
        layers |= new
    return tuple(sorted(layers))


def parse_numbers(text: str | None, option: str) -> tuple[int, ...]:
    """``0,1,-1`` -> (0, 1, -1); nothing for None.

    Raises:
        PlanError: it is no list of whole numbers.
    """
    words = text.split(",") if text else []
    if not all(re.fullmatch(r"\s*-?\d{1,6}\s*", word) for word in words):
        raise PlanError(f"{option} {shown(text)}: give layers with commas, as in 0,1,-1")
    return tuple(int(word) for word in words)


def checked_layers(numbers: Iterable[int], layers: int, option: str) -> frozenset[int]:
    """Layers by number, counted from the end where negative.

    >>> sorted(checked_layers([0, -1], 12, "--protect"))
    [0, 11]
    """
    found = set()
    for number in numbers:
        if not -layers <= number < layers:
            raise PlanError(f"{option} {number}: this model has {layers} layers, so give {-layers} to {layers - 1}")
        found.add(number % layers)
    return frozenset(found)


def check_count(count: int, layers: int, option: str = "--drop") -> int:
    """``count`` if that many of ``layers`` layers can be dropped."""
    if not 0 < count < layers:
        raise PlanError(f"{option} {count}: this model has {layers} layers, so give 1 to {layers - 1}")
    return count


def count_asked(drop: int | None, fraction: float | None) -> Callable[[int], int]:
    """What says, of a number of layers, how many go; it may be asked before there is a model.

    Raises:
        UsageError: neither is given, or both.
    """
    if drop is not None and fraction is None:
        return partial(check_count, drop)
    if fraction is not None and drop is None:
        return partial(count_of_fraction, fraction)
    raise UsageError("give either drop or fraction: how many layers go, or which share of them")


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
            f"Give a share that comes to 1 to {layers - 1} of them"
        )
    return count
