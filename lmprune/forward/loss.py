"""The loss of a model on tokens: cross-entropy of the next token, in nats."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lmprune.errors import LmpruneError
from lmprune.forward.memory import out_of_memory, release


@torch.no_grad()
def held_out_loss(model: Any, blocks: NDArray[np.int32], *, batch: int) -> float:
    """Mean loss a token over blocks of real tokens (blocks, length); ``batch`` halves when memory runs out.

    Raises:
        LmpruneError: it is no number, or memory is short even for one block.
    """
    device, total, at = model.device, 0.0, 0
    while at < len(blocks):
        part = torch.from_numpy(blocks[at : at + batch].astype(np.int64)).to(device)
        found = _within_memory(model, part)
        if found is not None:
            total += found
            at += batch
        elif batch == 1:
            raise LmpruneError(
                f"out of memory with one held-out block of {blocks.shape[1]} tokens. Use a smaller --max-length"
            )
        else:
            batch //= 2
            release()
    loss = total / (len(blocks) * (blocks.shape[1] - 1))
    if not math.isfinite(loss):
        raise LmpruneError(
            f"the held-out loss is {loss}: the model is broken before healing. Verify it with `lmprune verify`"
        )
    return loss


def _within_memory(model: Any, ids: Tensor) -> float | None:
    """The summed loss; None where memory ran out. In a function of its own, so that no traceback keeps the memory."""
    try:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        return float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    except (MemoryError, RuntimeError) as exc:
        if not out_of_memory(exc):
            raise
        return None


@torch.no_grad()
def sample_losses(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The summed loss of each sample of ``ids`` (samples, length), in float64 on the CPU.

    ``mask`` (samples, length) is 1 on tokens and 0 on padding, which stands on the right and is not counted.
    """
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    each = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double()
    if mask is not None:
        each = each * mask[:, 1:]
    return each.sum(1).cpu()
