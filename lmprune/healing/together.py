"""What a layer writes before a cut, solved for all its projections at once.

The layer before a cut is the whole model's own, so that its attention has no target of its own: all that it writes is
to make up for what is gone. Its projections are one linear map from all their inputs side by side, by ridge regression
around the old weights. Changing what an earlier projection writes changes what enters a later one, which is therefore
solved again afterwards; in a parallel block nothing changes and the map is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lmprune.healing.solving import AROUND, Sums, solve
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
    parts: Iterable[tuple[bool, Sequence[Tensor], Tensor]],
    ridges: Sequence[float],
) -> tuple[str, float] | None:
    """Set the weights of all ``writers`` of ``layer``; the form and the ridge, or None where none is better.

    Args:
        parts: for each batch whether it is held out, what enters each writer, (tokens, d_in), and what they should
            write together, (tokens, width), divided by their factor.
    """
    linears = [writer.linear(layer) for writer in writers]
    old = [weight_of(linear) for linear in linears]
    biases = [weight[-1:] if linear.bias is not None else None for weight, linear in zip(old, linears)]
    weights = [weight if bias is None else weight[:-1] for weight, bias in zip(old, biases)]
    bias = next((each for each in reversed(biases) if each is not None), None)
    # One column of ones for all: their biases are one sum, of which the last bears the change.
    others = sum((each for each in biases if each is not None and each is not bias), torch.zeros(1, 1))
    start = torch.cat([*weights, *([bias] if bias is not None else [])])
    sums = [Sums.empty(len(start) - (bias is not None), start.shape[1], bias=bias is not None) for _ in range(2)]
    for held, inputs, wanted in parts:
        sums[held] = sums[held].add(torch.cat(list(inputs), dim=1), wanted - others.to(wanted))
    sums = [each.settled() for each in sums]
    tried = [(sums[1].error(solve(sums[0], ridge, around=start)), ridge) for ridge in ridges]
    error, ridge = min(tried)
    if not error < sums[1].error(start):
        return None
    found = solve(sums[0] + sums[1], ridge, around=start)
    at = 0
    for linear, weight, own in zip(linears, weights, biases):
        new = found[at : at + len(weight)]
        at += len(weight)
        set_weight(linear, new if own is None else torch.cat([new, found[-1:] if own is bias else own]))
    return AROUND, ridge
