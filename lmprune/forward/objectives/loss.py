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
    logits = logits[:, :-1].float()
    each = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:].to(logits.device), reduction="none")
    if mask is not None:
        each = each * mask[:, 1:].to(each.device)
    return each.cpu().double().sum(1)
