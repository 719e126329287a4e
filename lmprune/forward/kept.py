"""States that the walks over a text leave for later walks, within a bounded number of bytes.

A search asks for plans step by step, and those of one step begin as those of the step before do: once greedy has
removed layer r, what it computes without layers j < r and r is, up to layer r, what it has computed without j. So
states stay, by batch and by the kept layers that made them, and a walk starts from the deepest that there is. They are
the very tensors that would be computed again: no bit depends on what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from torch import Tensor

from lmprune.forward.tree import Prefix

SHARE = 4
"""Of the memory that is free, a 4th may be taken by what is kept."""


class Kept:
    """States of the batches of one text, by the kept layers that made them.

    Args:
        batches: of sample numbers, all that there may be.
        lengths: of the samples.
        token_bytes: of a state.
        most: states of a batch at most; None: as many as there is room for.
        free: tells how many bytes are free.

    Attributes:
        proven: whether starting from states of earlier walks was found to change no bit; None: not tried yet.
        held: bytes that are taken.
    """

    def __init__(
        self,
        batches: Iterable[Sequence[int]],
        lengths: Sequence[int],
        token_bytes: int,
        *,
        most: int | None,
        free: Callable[[], int],
    ) -> None:
        padded = sum(len(batch) * max(lengths[sample] for sample in batch) for batch in batches)
        self._each, self._most, self._free = max(1, padded * token_bytes), most, free
        self._states: dict[tuple[int, ...], dict[Prefix, Any]] = {}
        self._open, self._limit = True, 0
        self.proven: bool | None = None
        self.held = 0

    def fit(self) -> None:
        """Look how much memory is free, before a walk over all batches."""
        self._limit = (self.held + self._free()) // SHARE if self._open else 0
        if self.held > self._limit:
            self._forget()

    @property
    def room(self) -> int:
        """How many states of every batch there is room for."""
        found = self._limit // self._each
        return found if self._most is None else min(found, self._most)

    def deepest(self, samples: Sequence[int], path: Prefix) -> int:
        """After how many layers of ``path`` there is a state, at most."""
        states = self._states.get(tuple(samples))
        return next((depth for depth in range(len(path), 0, -1) if path[:depth] in states), 0) if states else 0

    def state(self, samples: Sequence[int], prefix: Prefix) -> Any:
        """What the last of these layers gave."""
        return self._states[tuple(samples)][prefix]

    def make_room(self, samples: Sequence[int], paths: Iterable[Prefix], wanted: Collection[Prefix]) -> None:
        """Before a walk along ``paths`` that will leave ``wanted``: forget what it has least use for, if it must be."""
        states = self._states.setdefault(tuple(samples), {})
        along = {path[:depth] for path in paths for depth in range(1, len(path) + 1)}
        for prefix in [prefix for prefix in states if prefix in along]:
            states[prefix] = states.pop(prefix)  # behind those of plans that nobody asks for any more
        surplus = len(states) + sum(prefix not in states for prefix in wanted) - self.room
        for prefix in [prefix for prefix in states if prefix not in wanted][: max(0, surplus)]:
            self.held -= size_of(states.pop(prefix))

    def put(self, samples: Sequence[int], prefix: Prefix, output: Any) -> None:
        """Keep what the last of these layers gave, if there is room."""
        states, size = self._states.setdefault(tuple(samples), {}), size_of(output)
        if prefix not in states and self.held + size <= self._limit:
            states[prefix] = output
            self.held += size

    def close(self) -> bool:
        """Forget everything, and keep nothing from now on; whether anything was kept."""
        kept, self._open, self._limit = bool(self.held), False, 0
        self._forget()
        return kept

    def _forget(self) -> None:
        self._states.clear()
        self.held = 0


def width_of(text_config: Any) -> int:
    """Numbers of a token's state, as the config of a decoder says."""
    names = ("hidden_size", "n_embd", "d_model")
    return next((int(getattr(text_config, name)) for name in names if hasattr(text_config, name)), 1)


def size_of(output: Any) -> int:
    """Bytes of what a layer returns."""
    parts = output if isinstance(output, (tuple, list)) else (output,)
    return sum(part.numel() * part.element_size() for part in parts if isinstance(part, Tensor))
