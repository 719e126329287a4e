"""The loss of a model, or of many cuts of it, on tokens: cross-entropy of the next token, in nats."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from lmprune.cuts.plan import Plan
from lmprune.errors import DataError, LmpruneError
from lmprune.forward.batches import Batch, Rows, batches_of
from lmprune.forward.machine import Halving
from lmprune.forward.run import run
from lmprune.forward.views import Views
from lmprune.text.tokens import Tokens

_LOGITS_BYTES = 1 << 30
"""Room for the logits of a batch in float32, to start with."""
_PIECE_BYTES = 1 << 26
"""Of the same, for those whose loss is computed at once."""


@dataclass(frozen=True)
class Losses:
    """The loss of each plan on each sample.

    Attributes:
        values: (plans, samples) in float64: mean nats a predicted token; 0 for a sample that predicts none.
        tokens: (samples,) predicted tokens: one less than a sample holds.
    """

    values: NDArray[np.float64]
    tokens: NDArray[np.int64]

    def mean(self) -> NDArray[np.float64]:
        """(plans,) mean nats a token over all samples, each weighted by its tokens."""
        means: NDArray[np.float64] = self.values @ self.tokens / self.tokens.sum()
        return means


def losses(
    model: Any,
    plans: Sequence[Plan],
    tokens: Tokens,
    *,
    batch_size: int | None = None,
    share: bool = True,
    progress: bool = True,
) -> Losses:
    """The loss of each of ``plans`` of the live ``model`` on ``tokens``; ``Plan(L)`` is the whole model.

    Layers that plans have in common from the first on are computed once where that changes no number. The model is left
    as it was.

    Args:
        batch_size: samples in one forward pass; chosen by the device, and halved when memory runs out.
        share: whether layers in common are computed once; without, every plan is a pass of its own.
        progress: show a bar on a terminal.

    Raises:
        DataError: no sample has a token to predict.
        ModelError: a plan cannot be carried out, or memory runs out even for one sample.
    """
    rows: Rows = [np.asarray(row, dtype=np.int32) for row in tokens.rows]
    counts = np.array([int((row[1:] != tokens.unscored).sum()) for row in rows])
    if not counts.any():
        raise DataError(f"{tokens.source}: every sample is one token long, which leaves none to predict. Give more")
    sums = np.zeros((len(plans), len(rows)))
    if not plans:
        return Losses(sums, counts)

    def collect(name: str, samples: Sequence[int], batch: Batch, output: Any) -> None:
        found = summed(output.logits, batch.ids, batch.mask, tokens.unscored)
        sums[int(name), list(samples)] = found.numpy()

    views = Views(model, {str(number): plan for number, plan in enumerate(plans)}, share=share)
    batches = batches_of([len(row) for row in rows], batch_size or _usual_batch(model, max(map(len, rows))))
    with tqdm(total=sums.size, unit=" losses", disable=None if progress else True, leave=False) as bar:
        run(views, rows, batches, collect, did=bar.update, say=logging.getLogger("lmprune").info)
    return Losses(np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0), counts)


def _usual_batch(model: Any, length: int) -> int:
    """Samples in a forward pass to start with."""
    usual = 8 if next(model.parameters()).device.type == "cpu" else 32
    vocabulary = model.config.get_text_config().vocab_size
    return max(1, min(usual, _LOGITS_BYTES // (4 * length * vocabulary)))


def summed(logits: Tensor, ids: Tensor, mask: Tensor | None = None, unscored: int | None = None) -> Tensor:
    """The summed loss of each sample in float64 on the CPU, from ``logits`` (samples, length, vocabulary) for ``ids``.

    ``mask`` (samples, length) is 1 on tokens and 0 on padding, which stands on the right and is not counted; nor is
    the token ``unscored``.
    """
    each = _each(logits[:, :-1], targets(ids[:, 1:].to(logits.device), unscored))
    if mask is not None:
        each = each * mask[:, 1:].to(each.device)
    return each.cpu().double().sum(1)


def _each(logits: Tensor, wanted: Tensor) -> Tensor:
    """The loss of each position in float32, from ``logits`` (samples, length, vocabulary) for ``wanted``.

    In pieces: the logits of a large vocabulary may fit into memory once, but not in float32 with what comes of them.
    """
    at_once = max(1, _PIECE_BYTES // (4 * logits.shape[0] * logits.shape[-1]))
    pieces = zip(logits.split(at_once, 1), wanted.split(at_once, 1))
    found = [nn.functional.cross_entropy(p.float().transpose(1, 2), w, reduction="none") for p, w in pieces]
    return torch.cat(found, 1) if found else wanted.new_zeros(wanted.shape, dtype=torch.float32)


def targets(ids: Tensor, unscored: int | None) -> Tensor:
    """``ids`` as what should be predicted: -100, which torch's losses skip, in the place of ``unscored``."""
    return ids if unscored is None else ids.masked_fill(ids == unscored, -100)


@torch.no_grad()
def held_out_loss(model: Any, blocks: NDArray[np.int32], *, batch: int, unscored: int | None = None) -> float:
    """Mean loss a token over blocks of real tokens (blocks, length); ``batch`` halves when memory runs out.

    The token ``unscored`` is never asked for.

    Raises:
        LmpruneError: it is no number, or memory is short even for one block.
    """

    def work(part: list[NDArray[np.int32]]) -> float:
        ids = torch.from_numpy(np.stack(part).astype(np.int64)).to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return float(_each(logits, targets(ids[:, 1:], unscored)).sum())

    def hopeless(block: NDArray[np.int32]) -> LmpruneError:
        return LmpruneError(f"out of memory with one held-out block of {len(block)} tokens. Use a smaller --max-length")

    halving = Halving(work, hopeless)
    total = 0.0
    # Where memory is not refused but taken until the system kills the process, nothing is halved.
    vocabulary = model.config.get_text_config().vocab_size
    batch = max(1, min(batch, _LOGITS_BYTES // (4 * blocks.shape[1] * vocabulary)))
    for at in range(0, len(blocks), batch):
        for found in halving(list(blocks[at : at + batch])):
            total += found
    count = int((blocks[:, 1:] != unscored).sum()) if unscored is not None else len(blocks) * (blocks.shape[1] - 1)
    loss = total / max(1, count)
    if not math.isfinite(loss):
        raise LmpruneError(
            f"the held-out loss is {loss}: the model is broken before healing. Verify it with `lmprune verify`"
        )
    return loss
