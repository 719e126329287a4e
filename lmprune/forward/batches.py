"""Which samples go through the model together, and in which order. Pure."""

from __future__ import annotations

from collections.abc import Sequence

WINDOW = 64
"""Samples that are sorted by length among themselves, so that little of a batch is padding."""


def window_of(batch_size: int) -> int:
    """Samples in a window: whole batches, about `WINDOW` samples."""
    return batch_size * max(1, WINDOW // batch_size)


def batches_of(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of sample numbers: by length within each window, so that whole windows stay random samples.

    >>> batches_of([5, 3, 4], 2)
    [[1, 2], [0]]
    """
    window = window_of(batch_size)
    batches: list[list[int]] = []
    for start in range(0, len(lengths), window):
        order = sorted(range(start, min(start + window, len(lengths))), key=lambda sample: (lengths[sample], sample))
        batches += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return batches
