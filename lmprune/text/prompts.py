"""Prompts, from which a model goes on writing: the beginnings of samples of text. Knows no models."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np

from lmprune.errors import DataError
from lmprune.text.sources import Document, read_documents
from lmprune.text.talks import talk_ids
from lmprune.text.tokens import Tokens

PROMPT = 16
"""Tokens of a sample of one line that are the prompt."""


def prompts_of(samples: Tokens, tokenizer: Any, *, seed: int, first: int, default: str) -> Tokens:
    """A prompt for each of ``samples``: its first line; of one line, its first `PROMPT` tokens.

    Of conversations it is all up to the first answer. A sample that leaves nothing to go on from has none.

    Args:
        seed: by which the samples were drawn.
        first: how many samples of the source came before these.
        default: the source where none is named.

    Raises:
        DataError: no sample gives a prompt.
    """
    if samples.settings.chat_template:
        documents = read_documents(samples.settings, seed=seed, default=default)
        talks = islice(documents, first, first + samples.samples)
        longest = max(map(len, samples.rows))
        found = [ids for talk in talks if (ids := _asked(talk, tokenizer)) and len(ids) <= longest]
    else:
        found = [ids for row in samples.rows if (ids := _begun(row.tolist(), tokenizer))]
    if not found:
        raise DataError(f"{samples.source}: no sample can be a prompt. Give longer texts, or a greater --max-length")
    rows = tuple(np.array(ids, dtype=np.int32) for ids in found)
    return Tokens(rows, samples.source, samples.settings)


def _begun(ids: list[int], tokenizer: Any) -> list[int]:
    """The first line, with its end; of a row of one line, its first tokens; nothing of a shorter row."""
    for stop in range(2, min(len(ids), 8 * PROMPT)):
        if "\n" in tokenizer.decode(ids[stop - 1]):
            return ids[:stop]
    return ids[:PROMPT] if len(ids) > PROMPT else []


def _asked(talk: Document, tokenizer: Any) -> list[int]:
    """A conversation up to its first answer, as the tokenizer's template writes it."""
    messages = [{"role": "user", "content": talk}] if isinstance(talk, str) else talk
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    if not first:
        return []
    return talk_ids(messages[:first], tokenizer, ask=True)
