"""``loss``: cross-entropy of the next token of calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lmprune.forward.batches import Batch
from lmprune.text.tokens import Tokens

if TYPE_CHECKING:
    from lmprune.forward.objectives import Sources

_PIECE_BYTES = 1 << 26
"""Of logits in float32, for those whose loss is computed at once."""


def tokens(sources: Sources, argument: str) -> Tokens:
    """The text."""
    return sources.text()


def score(tokens: Tokens) -> CrossEntropy:
    """By cross-entropy."""
    return CrossEntropy(tokens)


class CrossEntropy:
    """The summed cross-entropy of each sample's counted tokens."""

    whole: ClassVar[bool] = False

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def knows(self, sample: int) -> bool:
        """There is nothing to know."""
        return True

    def learn(self, samples: Sequence[int], batch: Batch, logits: Tensor) -> None:
        """Nothing is kept."""

    def __call__(self, samples: Sequence[int], batch: Batch, logits: Tensor) -> NDArray[np.float64]:
        """See `Score`."""
        found: NDArray[np.float64] = summed(logits, batch.ids, counted(self._tokens, samples, batch)).numpy()
        return found


def counted(tokens: Tokens, samples: Sequence[int], batch: Batch) -> Tensor | None:
    """(samples, length) 1 on the tokens that count; 0 on padding, before an answer and on an unscored token.

    None where all count.
    """
    masks = [] if batch.mask is None else [batch.mask]
    if tokens.unscored is not None:
        masks.append((batch.ids != tokens.unscored).long())
    if tokens.starts is not None:
        first = torch.tensor([tokens.starts[sample] for sample in samples], device=batch.ids.device)
        masks.append((torch.arange(batch.ids.shape[1], device=batch.ids.device) >= first[:, None]).long())
    return torch.stack(masks).prod(0) if masks else None


def summed(logits: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The summed loss of each sample in float64 on the CPU, from ``logits`` (samples, length, vocabulary) for ``ids``.

    ``mask`` (samples, length) is 1 on the tokens that are counted and 0 on others, such as padding on the right.
    """
    each = token_losses(logits[:, :-1], ids[:, 1:].to(logits.device))
    if mask is not None:
        each = each * mask[:, 1:].to(each.device)
    return each.cpu().double().sum(1)


def token_losses(logits: Tensor, wanted: Tensor) -> Tensor:
    """The loss of each position in float32, from ``logits`` (samples, length, vocabulary) for ``wanted``.

    In pieces: the logits of a large vocabulary may fit into memory once, but not in float32 with what comes of them.
    """
    at_once = max(1, _PIECE_BYTES // (4 * logits.shape[0] * logits.shape[-1]))
    pieces = zip(logits.split(at_once, 1), wanted.split(at_once, 1))
    found = [nn.functional.cross_entropy(p.float().transpose(1, 2), w, reduction="none") for p, w in pieces]
    return torch.cat(found, 1) if found else wanted.new_zeros(wanted.shape, dtype=torch.float32)
