"""Run these plans over these batches into this collector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lmprune.errors import LmpruneError, ModelError
from lmprune.forward.batches import Batch, Rows
from lmprune.forward.calls import input_device, run_decoder
from lmprune.forward.machine import Halving, out_of_memory, release
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
) -> int:
    """Run every view over ``batches`` of sample numbers in ``rows``; their outputs go to ``collect``.

    Each batch is walked along the tree of layers in common, from states that earlier walks left where there are some.
    Whether sharing is exact is proven on the first sample, and
    where it is not, every view runs by itself. With more views than may be held at once, all batches run for some of
    them, then for the next.

    Args:
        did: is told after each batch how many samples some view has finished, summed over views.
        say: is told when batches are halved.

    Returns:
        How many layers were run, summed over samples.

    Raises:
        ModelError: memory runs out even for a single sample.
    """
    with torch.no_grad():
        return sum(_run(part, rows, batches, collect, did, say) for part in views.parts())


def _run(
    views: Views,
    rows: Rows,
    batches: Sequence[Sequence[int]],
    collect: Collect,
    did: Callable[[int], object] | None,
    say: Callable[[str], None] | None,
) -> int:
    device = input_device(views.view(views.turns[0].name))
    ran = 0

    def along_the_tree(samples: list[int]) -> None:
        nonlocal ran
        batch = Batch.of([rows[sample] for sample in samples], device)
        groups = views.groups(views.begin(samples))
        for turns, then in zip(groups, [*groups[1:], ()]):
            if views.goes_abreast:
                ran += views.side_by_side(turns, lambda view: run_decoder(view, batch), then) * len(samples)
            else:
                ran += sum(len(turn.path) - (turn.start if views.share else 0) for turn in turns) * len(samples)
            for turn in turns:
                with views.turn(turn) as view:
                    output = run_decoder(view, batch)
                collect(turn.name, samples, batch, output)

    def with_room(samples: list[int]) -> None:
        while True:
            try:
                return along_the_tree(samples)
            except (MemoryError, RuntimeError) as exc:
                if not (views.let_go() if out_of_memory(exc) else views.part_ways()):
                    raise
            # Outside the except block, as in `Halving`: what runs at once, or what earlier walks left, was too much.
            release()

    def hopeless(sample: int) -> LmpruneError:
        return ModelError(
            f"out of memory with one sample of {len(rows[sample])} tokens. Use --quantization nf4 or a smaller "
            "--max-length"
        )

    if len(views.turns) > 1:
        first = Batch.of([rows[batches[0][0]][:PROOF]], device)
        views.prove(lambda view: run_decoder(view, first).logits)
        both = Batch.of([rows[sample][: PROOF - short] for short, sample in enumerate(batches[0][:2])], device)
        views.prove_abreast(lambda view: run_decoder(view, both).logits)
    halving = Halving(with_room, hopeless, say)
    for samples in batches:
        halving(samples)
        if did is not None:
            did(len(samples) * len(views.turns))
    views.begin()
    return ran
