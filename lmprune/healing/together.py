"""What a layer writes before a cut, solved for all its projections at once.

The layer before a cut is the whole model's own, so that its attention has no target of its own: all that it writes is
to make up for what is gone. Its projections are one linear map from all their inputs side by side, by ridge regression
around the old weights. Changing what an earlier projection writes changes what enters a later one, which is therefore
solved again afterwards; in a parallel block nothing changes and the map is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lmprune.healing.fitting import fitted
from lmprune.healing.solving import AROUND
from lmprune.healing.writers import Stage, Writer, set_weight, weight_of


def can_be_joined(stages: Sequence[Stage]) -> bool:
    """Whether the sum of what they write is one linear map: several, no norm behind any, one factor for all."""
    if len(stages) < 2 or not all(stage.plain for stage in stages):
        return False
    writers = [stage.writers[0] for stage in stages]
    return not any(w.norm or w.experts for w in writers) and len({w.factor for w in writers}) == 1


def solve_together(
    layer: nn.Module,
    writers: Sequence[Writer],
    parts: Callable[[bool], Iterator[tuple[Sequence[Tensor], Tensor]]],
    ridges: Sequence[float],
) -> tuple[str, float] | None:
    """Set the weights of all ``writers`` of ``layer``; the form and the ridge, or None where none is better.

    Args:
        parts: of the held-out text or of the other, batch by batch: what enters each writer, (tokens, d_in), and what
            they should write together, (tokens, width), divided by their factor.
    """
    linears = [writer.linear(layer) for writer in writers]
    old = [weight_of(linear) for linear in linears]
    biases = [weight[-1:].clone() if linear.bias is not None else None for weight, linear in zip(old, linears)]
    weights = [weight if bias is None else weight[:-1] for weight, bias in zip(old, biases)]
    widths = [len(weight) for weight in weights]
    bias = next((each for each in reversed(biases) if each is not None), None)
    # One column of ones for all: their biases are one sum, of which the last bears the change.
    others = sum((each for each in biases if each is not None and each is not bias), torch.zeros(1, 1))
    start = torch.cat([*weights, *([bias] if bias is not None else [])])
    del old, weights  # they are as large as the start

    def joined(held: bool) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, wanted in parts(held):
            yield torch.cat(list(inputs), dim=1), wanted - others.to(wanted)

    found = fitted(joined, start, ridges, bias=bias is not None, forms=(AROUND,))
    if found.ridge is None:
        return None
    at = 0
    for linear, width, own in zip(linears, widths, biases):
        new = found.weight[at : at + width]
        at += width
        set_weight(linear, new if own is None else torch.cat([new, found.weight[-1:] if own is bias else own]))
    return AROUND, found.ridge
