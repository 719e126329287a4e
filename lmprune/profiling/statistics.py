"""From the states of a batch to the values of each of its samples, in float64 whatever the model's type."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmprune.forward.batches import Batch
from lmprune.forward.calls import check_state, not_run_once

_CACHE_BYTES = 4 << 20
_DEVICE_BYTES = 256 << 20
"""Bytes of float64 states that are multiplied at once: what a CPU's cache holds, what keeps a GPU busy."""

Values = NDArray[np.float64]
"""(samples, values): the distances of all pairs of states, L cosines, L relative magnitudes, L+1 norms."""


class Collector(Protocol):
    """Takes the states of one batch as they appear and gives the values of its samples; then takes the next."""

    def begin(self, batch: Batch) -> None:
        """Forget the batch before."""

    def take(self, state: int, hidden: Tensor) -> None:
        """Keep what is needed of state number ``state``, of shape (samples, length, width).

        Raises:
            ModelError: it has another shape.
        """

    def values(self) -> Values:
        """One row for each sample.

        Raises:
            ModelError: a state did not come, or came twice.
        """


def collector(token: str, layers: int) -> Collector:
    """The collector of a token mode."""
    return LastTokens(layers) if token == "last" else AllTokens(layers)


class _EveryState:
    """Sees to it that each state of a batch comes once, since room for one that never came holds anything."""

    def __init__(self, layers: int) -> None:
        self._states_count = layers + 1

    def begin(self, batch: Batch) -> None:
        self._batch = batch
        self._times = [0] * self._states_count

    def _came(self, state: int, hidden: Tensor) -> Tensor:
        check_state(hidden, self._batch)
        self._times[state] += 1
        return hidden.cpu() if hidden.device.type == "mps" else hidden  # which knows no float64

    def _require_all(self) -> None:
        for state, times in enumerate(self._times):
            if times != 1:
                raise not_run_once(min(state, self._states_count - 2), times)


class LastTokens(_EveryState):
    """Keeps the last token of each sample: (samples, L+1, width)."""

    def begin(self, batch: Batch) -> None:
        super().begin(batch)
        self._last = batch.lengths - 1
        self._rows = torch.arange(len(self._last), device=self._last.device)
        self._states: Tensor | None = None

    def take(self, state: int, hidden: Tensor) -> None:
        hidden = self._came(state, hidden)
        if self._states is None:
            self._states = hidden.new_empty(len(self._rows), self._states_count, hidden.shape[-1])
        self._states[:, state] = hidden[self._rows.to(hidden.device), self._last.to(hidden.device)]

    def values(self) -> Values:
        self._require_all()
        assert self._states is not None
        return _numpy(values_of(self._states.double()))


class AllTokens(_EveryState):
    """Keeps every token of a batch, (tokens, L+1, width), in one piece of memory that all batches share."""

    _room: Tensor | None = None

    def begin(self, batch: Batch) -> None:
        super().begin(batch)
        self._lengths = batch.lengths
        self._tokens = int(batch.lengths.sum())
        self._real = None if batch.mask is None else batch.mask.flatten().nonzero().squeeze(1)
        self._states: Tensor | None = None

    def take(self, state: int, hidden: Tensor) -> None:
        hidden = self._came(state, hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self._real is not None:
            flat = flat.index_select(0, self._real.to(flat.device))
        if self._states is None:
            self._states = self._allocate(flat)
        self._states[:, state] = flat

    def _allocate(self, like: Tensor) -> Tensor:
        shape = (self._tokens, self._states_count, like.shape[-1])
        room = self._room
        if room is None or room.numel() < math.prod(shape) or (room.dtype, room.device) != (like.dtype, like.device):
            room = self._room = like.new_empty(math.prod(shape))
        return room[: math.prod(shape)].view(shape)

    def values(self) -> Values:
        """The mean over each sample's tokens."""
        self._require_all()
        states = self._states
        assert states is not None
        lengths = self._lengths.to(states.device)
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=states.device), lengths)
        budget = _CACHE_BYTES if states.device.type == "cpu" else _DEVICE_BYTES
        chunk = max(1, budget // (8 * states.shape[1] * states.shape[2]))
        total: Tensor | float = 0.0
        for start in range(0, self._tokens, chunk):
            part = slice(start, start + chunk)
            # A product with 0s and 1s and not index_add, whose order of summation changes from run to run on a GPU.
            belongs = (owner[part] == torch.arange(len(lengths), device=states.device)[:, None]).double()
            total = total + belongs @ values_of(states[part].double())
        assert isinstance(total, Tensor)
        if not bool(total.isfinite().all()):  # 0 x NaN is NaN: one bad sample has spoilt the sums of the others
            total = torch.stack([values_of(part.double()).sum(0) for part in states.split(lengths.tolist())])
        return _numpy(total / lengths[:, None])


def values_of(states: Tensor) -> Tensor:
    """Values of each row of ``states``, (rows, L+1, width) in float64: see `Values`.

    In float32 an angle near 0 would be wrong by 4e-4: arccos is infinitely steep at 1.
    """
    gram = states @ states.transpose(1, 2)
    squares = gram.diagonal(dim1=1, dim2=2)
    norms = squares.sqrt()
    upper = torch.triu_indices(states.shape[1], states.shape[1], offset=1, device=states.device)
    rows, columns = upper[0], upper[1]
    cosines = (gram[:, rows, columns] / (norms[:, rows] * norms[:, columns])).clamp(-1.0, 1.0)
    steps = gram.diagonal(offset=1, dim1=1, dim2=2)
    added = (squares[:, 1:] + squares[:, :-1] - 2 * steps).clamp(min=0.0).sqrt()
    next_cosines = cosines[:, columns == rows + 1]
    return torch.cat([cosines.arccos() / math.pi, next_cosines, added / norms[:, 1:], norms], dim=1)


def split(values: Values, layers: int) -> tuple[Values, Values, Values, Values]:
    """Distances, cosines, relative magnitudes and norms out of rows of `Values`."""
    pairs = layers * (layers + 1) // 2
    distances, cosines, magnitudes, norms = np.split(values, [pairs, pairs + layers, pairs + 2 * layers], axis=1)
    return distances, cosines, magnitudes, norms


def width(layers: int) -> int:
    """Number of values of a sample."""
    return layers * (layers + 1) // 2 + 3 * layers + 1


def first_bad(values: Values, layers: int) -> tuple[int, int, str] | None:
    """(row, state, what is wrong) of the first state that is not finite or has no direction, if any."""
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if not len(bad):
        return None
    row = int(bad[0])
    distances, _, _, norms = split(values[row : row + 1], layers)
    infinite = np.flatnonzero(~np.isfinite(norms[0]))
    if len(infinite):
        return row, int(infinite[0]), "holds NaN or infinity"
    matrix = np.zeros((layers + 1, layers + 1))
    matrix[np.triu_indices(layers + 1, k=1)] = distances[0]
    undefined = np.isnan(matrix + matrix.T).sum(axis=1)
    return row, int(undefined.argmax()), "is a zero vector, which has no direction"


def _numpy(values: Tensor) -> Values:
    result: Values = values.cpu().numpy()
    return result
