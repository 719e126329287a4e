"""Text to token ids: tokenised, by the chat template where that is asked for, and packed. Knows no models.

A *sample* is one row of token ids without padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lmprune.errors import DataError, ModelError, UsageError, told_as
from lmprune.quiet import panics_unsaid
from lmprune.text.sources import DataSettings, Document, describe, read_documents
from lmprune.text.talks import talk_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_CHARACTERS = 64
"""Of one token, far above the mean of any text: no sample becomes shorter by it."""
_LARGEST = (1 << 31) - 1
AT_ONCE = 64
"""Documents that are read and tokenised together."""


@dataclass(frozen=True)
class Tokens:
    """Samples of token ids, ``rows[i]`` of shape (length,), and where they came from.

    Attributes:
        starts: of each sample, the place of the first token that is an answer: a loss counts from there on. None: all.
        unscored: a token that no loss asks for; see `joined`.
    """

    rows: tuple[NDArray[np.int32], ...]
    source: str = "caller"
    settings: DataSettings = field(default_factory=DataSettings)
    starts: tuple[int, ...] | None = None
    unscored: int | None = None

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
        asked = (row[max(1, start) :] for row, start in zip(self.rows, starts))
        return np.array([int((part != self.unscored).sum()) for part in asked], dtype=np.int64)

    def take(self, samples: int) -> Tokens:
        """The first ``samples`` samples."""
        return self.part(0, samples)

    def part(self, first: int, stop: int | None = None) -> Tokens:
        """The samples from ``first`` up to ``stop``."""
        starts = self.starts[first:stop] if self.starts is not None else None
        return replace(self, rows=self.rows[first:stop], starts=starts)


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
    documents = read_documents(settings, seed=seed, default=default)
    if not settings.pack:  # and the rest of a document would be tokenised in vain
        documents = (text[: max_length * _MOST_CHARACTERS] if isinstance(text, str) else text for text in documents)
    encoded = encode(documents, tokenizer, settings)
    whole = (row for row in encoded if row)
    rows: Iterator[list[int]] = (row[:max_length] for row in whole)
    unscored = None
    if settings.pack:
        rows, unscored = joined(whole, tokenizer, settings, max_length)
    elif settings.bos is not None:
        raise UsageError(f"--{'' if settings.bos else 'no-'}bos is for samples that are joined. Add --pack")
    taken = tuple(np.asarray(row, dtype=np.int32) for row in islice(rows, samples))
    if not taken:
        few = f" even one sample of {max_length} tokens. Use --no-pack or a smaller --max-length"
        raise DataError(f"{source} does not fill{few}" if settings.pack else f"{source} holds no tokens")
    return Tokens(taken, source, settings, unscored=unscored)


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
            yield from (talk_ids(talk, tokenizer) for talk in talks)
        elif all(isinstance(document, str) for document in group):
            rows = token_ids(group, tokenizer)
            if any(row and max(row) > _LARGEST for row in rows):
                raise ModelError("the model's tokenizer gives ids that no model has. Is it its tokenizer?")
            yield from rows
        else:
            raise DataError(f"{describe(settings)} holds conversations, not texts. Add --chat-template")


def token_ids(text: Any, tokenizer: Any, **how: Any) -> list[Any]:
    """The ids of a text, or those of each of several.

    Raises:
        ModelError: the tokenizer fails on it.
    """
    with told_as(ModelError, "the model's tokenizer cannot read this text"), panics_unsaid():
        # Rows are cut or packed later, so a warning that they pass the tokenizer's own limit is of no use.
        return list(tokenizer(text, return_attention_mask=False, verbose=False, **how)["input_ids"])


def check_known(rows: Iterable[Any], vocabulary: int | None, source: str) -> None:
    """Make sure that a model has an embedding for each id of arrays of them.

    Raises:
        DataError: it has not.
    """
    largest = max((int(row.max()) for row in rows if row.size), default=0)
    if vocabulary is not None and largest >= vocabulary:
        raise DataError(f"{source}: token {largest}, but the model knows 0 to {vocabulary - 1}. Is it its tokenizer?")


def begins(tokenizer: Any, asked: bool | None = None) -> int | None:
    """The token with which packed rows begin: the tokenizer's BOS where it puts one before each text, else None.

    A model that was trained with it reads text without it off its own distribution.

    Args:
        asked: the user's word, which goes before the tokenizer's.

    Raises:
        UsageError: one is asked for, and the tokenizer knows none.
    """
    bos = tokenizer.bos_token_id
    if asked and bos is None:
        raise UsageError("--bos: this model's tokenizer knows no token that begins a text. Leave it out")
    adds = bos is not None and token_ids("a", tokenizer)[:1] == [bos]
    return bos if (adds if asked is None else asked) else None


def pack(rows: Iterable[list[int]], end: int | None, length: int, bos: int | None = None) -> Iterator[list[int]]:
    """Rows one after another, the token ``end`` after each, cut into rows of ``length``; the rest is left out.

    With ``bos`` each of them begins with it, and each document within.

    >>> list(pack([[5, 6], [7, 0], [8, 9, 10]], 0, 3))
    [[5, 6, 0], [7, 0, 8]]
    >>> list(pack([[1, 5, 6, 7, 8], [1, 9]], 0, 4, bos=1))
    [[1, 5, 6, 7], [1, 8, 0, 1]]
    """
    stream: list[int] = []
    for row in rows:
        if bos is not None and row[:1] != [bos]:
            row = [bos, *row]
        if bos is not None and stream[-1:] == [bos]:  # where one token ends a text and begins the next
            row = row[1:]
        stream += row if end is None or row[-1:] == [end] else [*row, end]
        at = 0
        while True:
            head = [] if bos is None or length == 1 or stream[at : at + 1] == [bos] else [bos]
            stop = at + length - len(head)
            if stop > len(stream):
                break
            yield head + stream[at:stop]
            at = stop
        del stream[:at]


def between(tokenizer: Any, asked: bool | None = None) -> tuple[int, bool]:
    """The token between the documents of packed rows, and whether it begins one or ends one.

    Raises:
        UsageError: nothing stands between them.
    """
    bos, end = begins(tokenizer, asked), tokenizer.eos_token_id
    if bos is None and end is None:
        raise UsageError("--document-mask: this model's tokenizer puts nothing between texts. Leave it out")
    return (end, False) if bos is None else (bos, True)


def joined(
    rows: Iterable[list[int]], tokenizer: Any, settings: DataSettings, length: int
) -> tuple[Iterator[list[int]], int | None]:
    """What `encode` gives, packed as the settings want it; and the token in it that nobody is asked to predict.

    That is the one that begins a text, unless it ends texts too: what follows an end is no matter of language.

    Raises:
        UsageError: as `begins`.
    """
    bos, end = begins(tokenizer, settings.bos), tokenizer.eos_token_id
    if settings.bos is False and (put := begins(tokenizer)) is not None:
        rows = (row[1:] if row[:1] == [put] else row for row in rows)
    return pack(rows, end, length, bos), None if bos == end else bos
