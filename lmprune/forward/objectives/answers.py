"""``answers``: the share of the whole model's sure answers that a cut no longer gives, right to the last token.

An answer is the first line of what the whole model writes to a prompt. It is sure of one that it would also draw at
random at least every second time: one that comes by chance cannot be lost. Losses in nats hardly see a long answer that
goes wrong in one token; this sees nothing else. Where a model is sure of no line, as on plain web text, there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lmprune.errors import DataError
from lmprune.forward.batches import Batch
from lmprune.forward.objectives.written import Agreement
from lmprune.text.tokens import Tokens

if TYPE_CHECKING:
    from lmprune.forward.objectives import Sources

SURE = log(2)
"""Nats of an answer, at most."""
LEAST = 8
"""Fewer answers tell nothing."""


def tokens(sources: Sources, argument: str) -> Tokens:
    """Prompts, with the first lines of the whole model's sure answers as what counts."""
    return sources.sure()


def score(tokens: Tokens) -> Lost:
    """By what is lost."""
    return Lost(tokens)


class Lost(Agreement):
    """Of a sample whose answer is lost, what makes the mean over tokens the share of such samples."""

    def __init__(self, tokens: Tokens) -> None:
        super().__init__(tokens)
        self._each = float(tokens.predicted.mean())

    def __call__(self, samples: Sequence[int], batch: Batch, logits: Tensor) -> NDArray[np.float64]:
        """See `Score`; here it is no nats."""
        return super().__call__(samples, batch, logits) * self._each


def first_lines(written: Tokens, tokenizer: Any) -> Tokens:
    """``written`` with each answer cut off before what ends its first line; without those that begin with an end.

    Raises:
        DataError: nothing is left.
    """
    rows, starts = [], []
    for row, start in zip(written.rows, written.starts or ()):
        ends = (
            place
            for place, token in enumerate(row[start:].tolist(), start)
            if token == tokenizer.eos_token_id or "\n" in tokenizer.decode(token)
        )
        stop = next(ends, len(row))
        if stop > start:
            rows.append(row[:stop])
            starts.append(start)
    if not rows:
        raise DataError(f"{written.source}: no answer has a first line")
    return Tokens(tuple(rows), written.source, written.settings, tuple(starts))


def sure_ones(lines: Tokens, nats: NDArray[np.float64]) -> Tokens:
    """Those of at most `SURE` nats in all.

    Raises:
        DataError: they are too few.
    """
    kept = [number for number, each in enumerate(nats) if each <= SURE]
    if len(kept) < LEAST:
        raise DataError(
            f"--objective answers: the whole model is sure of {len(kept)} of its {lines.samples} answers to "
            f"{lines.source}, and {LEAST} are the least that tell anything. Give more --samples, text of questions, or "
            "another objective"
        )
    starts = lines.starts or ()
    return Tokens(
        tuple(lines.rows[number] for number in kept),
        lines.source,
        lines.settings,
        tuple(starts[number] for number in kept),
    )
