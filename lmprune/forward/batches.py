"""Which samples go through the model together, in which order, and how they are padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Row = NDArray[np.int32]
"""A sample of token ids, (length,)."""
Rows = list[Row]

WINDOW = 64
"""Samples that are sorted by length among themselves, so that little of a batch is padding."""


def window_of(batch_size: int) -> int:
    """Samples in a window: whole batches, about `WINDOW` samples."""
    return batch_size * max(1, WINDOW // batch_size)


def batches_of(lengths: Sequence[int], batch_size: int, window: int | None = None) -> list[list[int]]:
    """Batches of sample numbers: by length within each window, so that whole windows stay random samples.

    ``window`` is that of `window_of` unless it is given.

    >>> batches_of([5, 3, 4], 2)
    [[1, 2], [0]]
    """
    window = window or window_of(batch_size)
    batches: list[list[int]] = []
    for start in range(0, len(lengths), window):
        order = sorted(range(start, min(start + window, len(lengths))), key=lambda sample: (lengths[sample], sample))
        batches += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return batches


@dataclass(frozen=True)
class Batch:
    """Samples padded on the right: ids (samples, length), their lengths, and a mask where there is padding.

    Right padding whatever the tokenizer prefers: under a causal mask no real token sees it, and positions stay true.
    """

    ids: Tensor
    lengths: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, rows: Rows, device: torch.device) -> Batch:
        """From rows of ids."""
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        for place, row in zip(ids, rows):
            place[: len(row)] = torch.from_numpy(row)
        padded = bool((lengths != ids.shape[1]).any())
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long() if padded else None
        return cls(ids, lengths, mask).to(device)

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``."""
        return Batch(self.ids.to(device), self.lengths.to(device), None if self.mask is None else self.mask.to(device))

    def real(self, states: Tensor) -> Tensor:
        """``states`` (samples, length, width) of the tokens alone, without padding, as (tokens, width)."""
        flat = states.reshape(-1, states.shape[-1])
        return flat if self.mask is None else flat[self.mask.to(flat.device).flatten().bool()]
