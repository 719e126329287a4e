"""Text to token ids: tokenised, by the chat template where that is asked for, and packed. Knows no models.

A *sample* is one row of token ids without padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lmprune.errors import DataError
from lmprune.text.sources import DataSettings, Document, describe, read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 64
"""Documents that are read and tokenised together."""


@dataclass(frozen=True)
class Tokens:
    """Samples of token ids, ``rows[i]`` of shape (length,), and where they came from.

    Attributes:
        starts: of each sample, the place of the first token that is an answer: a loss counts from there on. None: all.
    """

    rows: tuple[NDArray[np.int32], ...]
    source: str = "caller"
    settings: DataSettings = field(default_factory=DataSettings)
    starts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.rows or not all(len(row) for row in self.rows):
            raise DataError(f"{self.source}: {'a sample is' if self.rows else 'the data are'} empty. Give some text")

    @classmethod
    def from_padded(cls, input_ids: Any, attention_mask: Any = None, source: str = "caller") -> Tokens:
        """Samples from a padded batch of shape (samples, length), padded left or right; its mask is 1 on tokens."""
        ids = np.asarray(input_ids)
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
        if ids.ndim != 2 or ids.shape != mask.shape:
            raise DataError(f"a batch of tokens has the shape (samples, length), and its mask too, not {ids.shape}")
        return cls(tuple(row[keep.astype(bool)].astype(np.int32) for row, keep in zip(ids, mask)), source)

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.rows)

    @property
    def count(self) -> int:
        """Number of tokens in all samples."""
        return sum(len(row) for row in self.rows)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the ids of every sample in order, the same on every machine."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(len(row).to_bytes(8, "little"))
            digest.update(row.astype("<i4").tobytes())
        if self.starts is not None:
            digest.update(repr(self.starts).encode())
        return "sha256:" + digest.hexdigest()

    @property
    def predicted(self) -> NDArray[np.int64]:
        """(samples,) how many tokens a loss counts: all but the first, or those of the answer."""
        starts = self.starts or (1,) * self.samples
        return np.array([len(row) - max(1, start) for row, start in zip(self.rows, starts)], dtype=np.int64)

    def take(self, samples: int) -> Tokens:
        """The first ``samples`` samples."""
        return self.part(0, samples)

    def part(self, first: int, stop: int | None = None) -> Tokens:
        """The samples from ``first`` up to ``stop``."""
        starts = self.starts[first:stop] if self.starts is not None else None
        return Tokens(self.rows[first:stop], self.source, self.settings, starts)


def tokenize(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    max_length: int,
    seed: int,
    default: str = "c4",
) -> Tokens:
    """The first ``samples`` samples of the source, each of at most ``max_length`` tokens; fewer if it ends before.

    A smaller ``samples`` gives a prefix of the same samples.

    Raises:
        DataError: as `read_documents` and `encode`, or no sample comes out.
        NetworkError: as `read_documents`.
    """
    source = describe(settings, default)
    encoded = encode(read_documents(settings, seed=seed, default=default), tokenizer, settings)
    whole = (row for row in encoded if row)
    rows = pack(whole, tokenizer.eos_token_id, max_length) if settings.pack else (row[:max_length] for row in whole)
    taken = tuple(np.asarray(row, dtype=np.int32) for row in islice(rows, samples))
    if not taken:
        few = f" even one sample of {max_length} tokens. Use --no-pack or a smaller --max-length"
        raise DataError(f"{source} does not fill{few}" if settings.pack else f"{source} holds no tokens")
    return Tokens(taken, source, settings)


def encode(
    documents: Iterable[Document], tokenizer: Any, settings: DataSettings, *, at_once: int = AT_ONCE
) -> Iterator[list[int]]:
    """The token ids of each document, whole.

    Args:
        at_once: documents that are read before the first row comes: one where those that are read count as used.

    Raises:
        DataError: there is no chat template but one is asked for, or a conversation and none is.
    """
    if settings.chat_template and not tokenizer.chat_template:
        raise DataError("this model's tokenizer has no chat template. Leave out --chat-template")
    iterator = iter(documents)
    while group := list(islice(iterator, at_once)):
        if settings.chat_template:
            talks = [[{"role": "user", "content": doc}] if isinstance(doc, str) else doc for doc in group]
            yield from (list(tokenizer.apply_chat_template(t, tokenize=True, return_dict=False)) for t in talks)
        elif all(isinstance(document, str) for document in group):
            # Whole rows are cut or packed later, so a warning that they pass the tokenizer's own limit is of no use.
            yield from tokenizer(group, return_attention_mask=False, verbose=False)["input_ids"]
        else:
            raise DataError(f"{describe(settings)} holds conversations, not texts. Add --chat-template")


def pack(rows: Iterable[list[int]], end: int | None, length: int) -> Iterator[list[int]]:
    """Rows one after another, the token ``end`` after each, cut into rows of ``length``; the rest is left out.

    >>> list(pack([[5, 6], [7, 0], [8, 9, 10]], 0, 3))
    [[5, 6, 0], [7, 0, 8]]
    """
    stream: list[int] = []
    for row in rows:
        stream += row if end is None or row[-1:] == [end] else [*row, end]
        whole = len(stream) // length * length
        yield from (stream[at : at + length] for at in range(0, whole, length))
        del stream[:whole]
