"""Run these plans over these batches into this collector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lmprune.errors import LmpruneError, ModelError
from lmprune.forward.batches import Batch, Rows
from lmprune.forward.calls import input_device, run_decoder
from lmprune.forward.machine import Halving
from lmprune.forward.views import Views

PROOF = 32
"""Tokens on which it is proven that sharing changes nothing, at most."""
Collect = Callable[[str, Sequence[int], Batch, Any], None]
"""``collect(name, samples, batch, output)`` gets what the view of that name returns for those samples.

Where memory runs out in the middle of a batch, its samples come again in halves: what comes later replaces what came.
"""


def run(
    views: Views,
    rows: Rows,
    batches: Sequence[Sequence[int]],
    collect: Collect,
    *,
    did: Callable[[int], object] | None = None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Run every view over ``batches`` of sample numbers in ``rows``; their outputs go to ``collect``.

    Each batch is walked along the tree of layers in common. Whether sharing is exact is proven on the first sample, and
    where it is not, every view runs by itself. With more views than may be held at once, all batches run for some of
    them, then for the next.

    Args:
        did: is told after each batch how many samples some view has finished, summed over views.
        say: is told when batches are halved.

    Raises:
        ModelError: memory runs out even for a single sample.
    """
    with torch.no_grad():
        for part in views.parts():
            _run(part, rows, batches, collect, did, say)


def _run(
    views: Views,
    rows: Rows,
    batches: Sequence[Sequence[int]],
    collect: Collect,
    did: Callable[[int], object] | None,
    say: Callable[[str], None] | None,
) -> None:
    device = input_device(views.view(views.turns[0].name))

    def along_the_tree(samples: list[int]) -> None:
        batch = Batch.of([rows[sample] for sample in samples], device)
        views.begin()
        for turn in views.turns:
            with views.turn(turn) as view:
                output = run_decoder(view, batch)
            collect(turn.name, samples, batch, output)

    def hopeless(sample: int) -> LmpruneError:
        return ModelError(
            f"out of memory with one sample of {len(rows[sample])} tokens. Use --quantization nf4 or a smaller "
            "--max-length"
        )

    if len(views.turns) > 1:
        first = Batch.of([rows[batches[0][0]][:PROOF]], device)
        views.prove(lambda view: run_decoder(view, first).logits)
    halving = Halving(along_the_tree, hopeless, say)
    for samples in batches:
        halving(samples)
        if did is not None:
            did(len(samples) * len(views.turns))
    views.begin()
