"""How often models would say the same next token on the same prefixes: one pass of each, and no generation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from lmprune.errors import DataError, LmpruneError, ModelError
from lmprune.forward.batches import Batch, Rows, batches_of
from lmprune.forward.loss import usual_batch
from lmprune.forward.machine import Halving
from lmprune.forward.objectives.loss import token_losses
from lmprune.forward.run import run
from lmprune.forward.views import Views
from lmprune.text.tokens import Tokens


@dataclass(frozen=True)
class Mean:
    """A mean over all next tokens, and its standard error: samples are drawn, and not their tokens one by one."""

    value: float
    stderr: float

    @classmethod
    def of(cls, sums: NDArray[np.float64], counts: NDArray[np.int64]) -> Mean:
        """From each sample's sum and number of tokens: a ratio of sums (Cochran 1977, Sampling Techniques, ch. 6).

        >>> Mean.of(np.array([1.0, 3.0]), np.array([2, 4]))
        Mean(value=0.6666666666666666, stderr=0.1111111111111111)
        """
        used = counts > 0
        sums, counts = sums[used], counts[used]
        n, total = len(counts), int(counts.sum())
        mean = float(sums.sum() / total)
        spread = float(((sums - mean * counts) ** 2).sum())
        return cls(mean, math.sqrt(spread * n / (n - 1)) / total if n > 1 else 0.0)


@dataclass(frozen=True)
class Agreement:
    """Means over all next tokens.

    Attributes:
        greedy: the share on which both models' likeliest token is the same.
        acceptance: sum over the vocabulary of min(p, q): the chance that a token sampled from the one is accepted by
            the other (Leviathan et al. 2023, arXiv 2211.17192, theorem 3.5).
        tokens: how many were looked at.
        stderr: the standard error of ``greedy``.
    """

    greedy: float
    acceptance: float
    tokens: int
    stderr: float = 0.0

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
    rows = _rows(tokens)

    def work(samples: list[int]) -> tuple[list[int], Tensor]:
        batch = Batch.of([rows[sample] for sample in samples], reference.device)
        first, second = (_logits(one, batch) for one in (reference, model))
        return samples, _sums(first, second.to(first.device), batch.mask)

    def hopeless(sample: int) -> LmpruneError:
        return LmpruneError(f"out of memory with one sample of {len(rows[sample])} tokens. Use a smaller --max-length")

    halving = Halving(work, hopeless)
    sums = np.zeros((len(rows), 3))
    lengths = [len(row) for row in rows]
    for samples in _shown(batches_of(lengths, batch_size or usual_batch(reference, max(lengths)))):
        for part, found in halving(samples):
            sums[part] = found.numpy()
    same, accepted, counts = sums.T
    greedy = Mean.of(same, counts.astype(np.int64))
    return Agreement(greedy.value, float(accepted.sum() / counts.sum()), int(counts.sum()), greedy.stderr)


@dataclass(frozen=True)
class Said:
    """What a model says on a text.

    Attributes:
        ids: of each sample its likeliest next tokens, at every place but the last.
        losses: (samples,) nats, summed over each sample's next tokens.
    """

    ids: tuple[NDArray[np.int32], ...]
    losses: NDArray[np.float64]

    @property
    def counts(self) -> NDArray[np.int64]:
        """(samples,) next tokens."""
        return np.array([len(row) for row in self.ids])

    @property
    def loss(self) -> Mean:
        """Nats a token."""
        return Mean.of(self.losses, self.counts)

    def same_as(self, other: Said) -> Mean:
        """The share of next tokens that both say alike."""
        same = [float((ours == theirs).sum()) for ours, theirs in zip(self.ids, other.ids, strict=True)]
        return Mean.of(np.array(same), self.counts)


def said(views: Views, tokens: Tokens, *, say: Callable[[str], None] | None = None) -> Mapping[str, Said]:
    """What each of ``views`` says on ``tokens``, by name; layers in common are computed once.

    Raises:
        DataError: no sample has a token to predict.
        ModelError: memory runs out even for one sample.
    """
    rows = _rows(tokens)
    ids: dict[str, list[NDArray[np.int32]]] = {name: [np.zeros(0, np.int32)] * len(rows) for name in views.plans}
    losses = {name: np.zeros(len(rows)) for name in views.plans}

    def collect(name: str, samples: Sequence[int], batch: Batch, output: Any) -> None:
        logits = output.logits[:, :-1]
        best = logits.argmax(-1).to(torch.int32).cpu().numpy()
        wanted = batch.ids[:, 1:].to(logits.device)
        if batch.mask is not None:
            wanted = wanted.masked_fill(batch.mask[:, 1:].to(logits.device) == 0, -100)
        nats = token_losses(logits, wanted).double().cpu().numpy()
        for place, sample in enumerate(samples):
            length = len(rows[sample]) - 1
            ids[name][sample] = best[place, :length]
            losses[name][sample] = nats[place, :length].sum()

    lengths = [len(row) for row in rows]
    batches = batches_of(lengths, usual_batch(views.view(next(iter(views.plans))), max(lengths)))
    with tqdm(total=len(rows) * len(views.plans), desc="agreement", leave=False, disable=None) as bar:
        run(views, rows, batches, collect, did=bar.update, say=say)
    return {name: Said(tuple(ids[name]), losses[name]) for name in views.plans}


def _rows(tokens: Tokens) -> Rows:
    rows: Rows = [np.asarray(row, dtype=np.int32) for row in tokens.rows if len(row) > 1]
    if not rows:
        raise DataError(f"{tokens.source}: every sample is one token long, which leaves none to predict. Give more")
    return rows


def _logits(model: Any, batch: Batch) -> Tensor:
    given = batch.to(model.device)
    logits: Tensor = model(input_ids=given.ids, attention_mask=given.mask, use_cache=False).logits
    return logits[:, :-1].float()


def _sums(first: Tensor, second: Tensor, mask: Tensor | None) -> Tensor:
    """(samples, 3) places of one likeliest token, the common probability, places; of (samples, length, vocabulary)."""
    everywhere = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
    counted = everywhere if mask is None else mask[:, 1:].to(first.device).bool()
    same = (first.argmax(-1) == second.argmax(-1)) & counted
    common = torch.minimum(first.softmax(-1), second.softmax(-1)).sum(-1).double() * counted
    return torch.stack([same.sum(-1).double(), common.sum(-1), counted.sum(-1).double()], -1).cpu()


def _shown(batches: Sequence[list[int]]) -> Any:
    return tqdm(batches, "agreement", leave=False, disable=None)
