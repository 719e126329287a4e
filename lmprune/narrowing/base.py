"""What a method of width sees of a layer, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Inner:
    """What lies between the maps that read the stream and the one that writes to it: an MLP's neurons, or heads.

    Attributes:
        gram: of what enters the writer, g'g (m, m), summed over tokens, in float64.
        writer: its weight, (m, d_out): it writes g ``writer``.
        readers: weights of the maps that make g of the stream, (rows, d_in) each: gate and up, or query, key and value.
        units: how many neurons, or key-value groups, there are: unit u is the u-th run of m / units inputs.
        tokens: that the Gram matrix is of.
    """

    gram: Tensor
    writer: Tensor
    readers: tuple[Tensor, ...]
    units: int
    tokens: int


@dataclass(frozen=True)
class Order:
    """The order in which units go, and what it costs.

    Attributes:
        units: their numbers (units,), the first to go first: what is kept of n is the last n.
        costs: (units,) as of `lmprune.narrowing.elimination.Elimination`; None where the method knows none.
    """

    units: Tensor
    costs: Tensor | None = None

    def kept(self, count: int) -> Tensor:
        """The units that are left of ``count``, ascending."""
        return self.units[len(self.units) - count :].sort().values


@dataclass(frozen=True)
class Rotation:
    """Directions of the stream, the most important first.

    Attributes:
        directions: (d, d), orthonormal columns, in float64.
        energies: (d,) the mean square along each.
    """

    directions: Tensor
    energies: Tensor

    def kept(self, size: int) -> float:
        """The share of the energy that the first ``size`` directions hold."""
        total = float(self.energies.sum())
        return float(self.energies[:size].sum()) / total if total else 1.0


class Method(Protocol):
    """A way to choose what of a layer goes. A module with such a function and an ``AXIS`` is one.

    Attributes:
        AXIS: what it makes narrower: ``ffn`` or ``groups``.
    """

    AXIS: str

    def order(self, inner: Inner) -> Order:
        """In which order the units of a layer go."""


def by_score(scores: Tensor) -> Order:
    """The lowest first; of equals the later unit, so that what stays is what comes first."""
    return Order(len(scores) - 1 - scores.flip(0).sort(stable=True).indices)
