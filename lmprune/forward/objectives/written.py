"""``self``: cross-entropy of what the whole model itself writes to prompts, worked steps included.

What a model writes is what it should go on writing (self-data, arXiv 2410.09982), and a chain of steps is lost with one
wrong token. So beside the loss there is `Agreement`: under the right answer so far, is every next token of it still the
likeliest? If so, greedy generation writes that very answer: exact match for the price of one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmprune.errors import DataError
from lmprune.forward.batches import Batch
from lmprune.forward.calls import generating
from lmprune.forward.machine import Halving
from lmprune.forward.objectives.loss import CrossEntropy, counted
from lmprune.forward.processes import Processes
from lmprune.text.tokens import Tokens

if TYPE_CHECKING:
    from lmprune.forward.objectives import Sources

LONGEST = 128
"""Tokens of an answer, at most."""
_BATCH = 32


def tokens(sources: Sources, argument: str) -> Tokens:
    """Prompts, with the whole model's answers as what counts."""
    return sources.written()


def score(tokens: Tokens) -> CrossEntropy:
    """By cross-entropy."""
    return CrossEntropy(tokens)


class Agreement(CrossEntropy):
    """0 of a sample whose every counted token is the likeliest, 1 of another."""

    def __call__(self, samples: Sequence[int], batch: Batch, logits: Tensor) -> NDArray[np.float64]:
        """See `Score`; here it is no nats."""
        mask, likeliest = counted(self._tokens, samples, batch), logits[:, :-1].argmax(-1)
        wrong = (likeliest != batch.ids[:, 1:].to(likeliest.device)).long()
        if mask is not None:
            wrong = wrong * mask[:, 1:].to(wrong.device)
        found: NDArray[np.float64] = (wrong.sum(1) > 0).cpu().double().numpy()
        return found


def write(
    model: Any, prompts: Tokens, *, end: int | None, longest: int = LONGEST, processes: Processes | None = None
) -> Tokens:
    """``prompts``, each with the answer that ``model`` writes greedily, its end token too where it comes to one.

    A prompt to which nothing is written is left out. Processes share the prompts, and all get all answers.

    Raises:
        DataError: that is so of all.
    """
    from lmprune.errors import ModelError

    def work(rows: list[NDArray[np.int32]]) -> list[list[int]]:
        return _answers(model, rows, end, longest)

    halving = Halving(work, lambda row: ModelError(f"out of memory with one prompt of {len(row)} tokens"))
    rows, starts = [], []
    order = sorted(range(prompts.samples), key=lambda i: (len(prompts.rows[i]), i))
    together = processes or Processes()
    mine: dict[int, list[int]] = {}
    for at in range(0, len(order), _BATCH)[together.rank :: together.size]:
        part = order[at : at + _BATCH]
        found = [answer for answers in halving([prompts.rows[i] for i in part]) for answer in answers]
        mine |= dict(zip(part, found))
    answers = {number: answer for each in together.gather(mine) for number, answer in each.items()}
    for i, prompt in enumerate(prompts.rows):
        if answers[i]:
            rows.append(np.concatenate([prompt, np.array(answers[i], dtype=np.int32)]))
            starts.append(len(prompt))
    if not rows:
        raise DataError(f"{prompts.source}: the whole model writes nothing to any prompt of it. Give other text")
    return Tokens(tuple(rows), f"the model's own answers to {prompts.source}", prompts.settings, tuple(starts))


@torch.no_grad()
def _answers(model: Any, rows: list[NDArray[np.int32]], end: int | None, longest: int) -> list[list[int]]:
    """What the model writes to each prompt: the likeliest token each time, and nothing of its makers' settings."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, width - len(row) :], mask[place, width - len(row) :] = torch.from_numpy(row), 1
    with generating(model, eos_token_id=end, pad_token_id=end or 0, do_sample=False, max_new_tokens=longest):
        out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
    return [_until(row[width:], end) for row in out.tolist()]


def _until(written: list[int], end: int | None) -> list[int]:
    """Up to the first end token, with it."""
    return written[: written.index(end) + 1] if end is not None and end in written else written
