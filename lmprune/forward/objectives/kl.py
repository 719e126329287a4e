"""``kl``: the divergence of the cut model's next-token distribution from the whole model's, on calibration text.

KL(p || q) over the whole model's `TOP` likeliest tokens and, as one outcome, the rest. By the log sum inequality it is
at most the divergence over the vocabulary; it leaves out only how the two differ within the rest. EvoPress (arXiv
2410.14649) searches by this divergence, and finds a few hundred tokens enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmprune.forward.batches import Batch
from lmprune.forward.objectives.loss import counted
from lmprune.text.tokens import Tokens

if TYPE_CHECKING:
    from lmprune.forward.objectives import Sources

TOP = 64
"""Tokens of the whole model that are kept at each place: 512 bytes."""
_LEAST = 1e-7
"""Below it the rest's share is lost in float32."""


def tokens(sources: Sources, argument: str) -> Tokens:
    """The text."""
    return sources.text()


def score(tokens: Tokens) -> Divergence:
    """By divergence from the whole model."""
    return Divergence(tokens)


class Divergence:
    """The summed divergence from the whole model at each sample's counted tokens."""

    whole: ClassVar[bool] = True

    def __init__(self, tokens: Tokens, top: int = TOP) -> None:
        self._tokens, self._top = tokens, top
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def knows(self, sample: int) -> bool:
        """See `Score`."""
        return sample in self._kept

    def learn(self, samples: Sequence[int], batch: Batch, logits: Tensor) -> None:
        """See `Score`."""
        kept, where = torch.log_softmax(logits[:, :-1].float(), -1).topk(min(self._top, logits.shape[-1]))
        for place, (sample, length) in enumerate(zip(samples, batch.lengths.tolist())):
            self._kept[sample] = (kept[place, : length - 1].cpu(), where[place, : length - 1].to(torch.int32).cpu())

    def __call__(self, samples: Sequence[int], batch: Batch, logits: Tensor) -> NDArray[np.float64]:
        """See `Score`."""
        places, mask = batch.ids.shape[1] - 1, counted(self._tokens, samples, batch)
        width = self._kept[samples[0]][0].shape[-1]
        ours = torch.log_softmax(logits[:, :-1].float(), -1)
        wanted = torch.zeros(len(samples), places, width, device=ours.device)
        where = torch.zeros(len(samples), places, width, dtype=torch.long, device=ours.device)
        for place, sample in enumerate(samples):
            kept, ids = self._kept[sample]
            wanted[place, : len(kept)], where[place, : len(ids)] = kept.to(ours.device), ids.to(ours.device).long()
        each = _divergence(wanted, ours.gather(-1, where))
        if mask is not None:
            each = each * mask[:, 1:].to(each.device)
        found: NDArray[np.float64] = each.cpu().double().sum(1).numpy()
        return found


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """From log-probabilities (..., top) of the same tokens; what they lack to 1 is one outcome more."""
    rest_p, rest_q = ((1 - log.exp().sum(-1)).clamp_min(_LEAST) for log in (p, q))
    return (p.exp() * (p - q)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())
