"""How often two models would say the same next token on the same prefixes: one pass of each, and no generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lmprune.errors import DataError, LmpruneError, ModelError
from lmprune.forward.batches import Batch, Rows, batches_of
from lmprune.forward.loss import usual_batch
from lmprune.forward.machine import Halving
from lmprune.text.tokens import Tokens


@dataclass(frozen=True)
class Agreement:
    """Means over all next tokens.

    Attributes:
        greedy: the share on which both models' likeliest token is the same.
        acceptance: sum over the vocabulary of min(p, q): the chance that a token sampled from the one is accepted by
            the other (Leviathan et al. 2023, arXiv 2211.17192, theorem 3.5).
        tokens: how many were looked at.
    """

    greedy: float
    acceptance: float
    tokens: int

    def to_data(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@torch.no_grad()
def agreement(reference: Any, model: Any, tokens: Tokens, *, batch_size: int | None = None) -> Agreement:
    """How often ``model`` says what ``reference`` does on ``tokens``; both are live models of one vocabulary.

    Raises:
        ModelError: their vocabularies differ in size.
        DataError: no sample has a token to predict.
        LmpruneError: memory runs out even for one sample.
    """
    sizes = [one.config.get_text_config().vocab_size for one in (reference, model)]
    if sizes[0] != sizes[1]:
        raise ModelError(f"the vocabularies are of {sizes[0]} and {sizes[1]} tokens, so no next token can be compared")
    rows: Rows = [np.asarray(row, dtype=np.int32) for row in tokens.rows if len(row) > 1]
    if not rows:
        raise DataError(f"{tokens.source}: every sample is one token long, which leaves none to predict. Give more")

    def work(samples: list[int]) -> Tensor:
        batch = Batch.of([rows[sample] for sample in samples], reference.device)
        first, second = (_logits(one, batch) for one in (reference, model))
        return _sums(first, second.to(first.device), batch.mask)

    def hopeless(sample: int) -> LmpruneError:
        return LmpruneError(f"out of memory with one sample of {len(rows[sample])} tokens. Use a smaller --max-length")

    halving = Halving(work, hopeless)
    sums = torch.zeros(3, dtype=torch.float64)
    lengths = [len(row) for row in rows]
    for samples in _shown(batches_of(lengths, batch_size or usual_batch(reference, max(lengths)))):
        for part in halving(samples):
            sums += part
    same, accepted, count = sums.tolist()
    return Agreement(same / count, accepted / count, int(count))


def _logits(model: Any, batch: Batch) -> Tensor:
    given = batch.to(model.device)
    logits: Tensor = model(input_ids=given.ids, attention_mask=given.mask, use_cache=False).logits
    return logits[:, :-1].float()


def _sums(first: Tensor, second: Tensor, mask: Tensor | None) -> Tensor:
    """Positions of one likeliest token, the common probability, and positions; of (samples, length, vocabulary)."""
    everywhere = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
    counted = everywhere if mask is None else mask[:, 1:].to(first.device).bool()
    same = (first.argmax(-1) == second.argmax(-1))[counted].sum()
    common = torch.minimum(first.softmax(-1), second.softmax(-1)).sum(-1)[counted].double().sum()
    return torch.stack([same.double(), common, counted.sum().double()]).cpu()


def _shown(batches: Sequence[list[int]]) -> Any:
    return tqdm(batches, "agreement", leave=False, disable=None)
