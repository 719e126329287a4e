"""Text to fixed-length blocks, held-out documents apart from training ones. Knows nothing about models or torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmprune.errors import DataError
from lmprune.text.sources import DataSettings, Document, describe, read_documents
from lmprune.text.tokens import encode, joined

HELD_OUT_SEED = 7
"""Held-out documents are the first in this order, whatever the run's seed, so that losses can be compared."""


@dataclass(frozen=True)
class Blocks:
    """Packed token ids, (blocks, length) each. Every position is a real token: nothing is padded.

    ``unscored`` is a token that no loss asks for; see `lmprune.text.tokens.joined`. ``mark`` is there where documents
    are kept apart: the token between them, and whether it begins one or ends one.
    """

    train: NDArray[np.int32]
    held_out: NDArray[np.int32]
    source: str
    unscored: int | None = None
    mark: tuple[int, bool] | None = None

    @property
    def places(self) -> Callable[[NDArray[np.int32]], NDArray[np.int64]] | None:
        """What gives each token of a block its place in its own document; None where documents are not kept apart."""
        return None if self.mark is None else partial(places, token=self.mark[0], begins=self.mark[1])

    @property
    def hash(self) -> str:
        """SHA-256 of both parts."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            digest.update(repr(part.shape).encode() + np.ascontiguousarray(part).tobytes())
        return "sha256:" + digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write both parts, so that a resumed run and other processes read the same blocks."""
        with path.open("wb") as file:
            unscored = [] if self.unscored is None else [self.unscored]
            mark = [] if self.mark is None else self.mark
            np.savez(file, train=self.train, held_out=self.held_out, source=self.source, unscored=unscored, mark=mark)

    @classmethod
    def load(cls, path: Path) -> Blocks:
        """Read what `save` wrote."""
        with np.load(path) as data:
            unscored = int(data["unscored"][0]) if len(data["unscored"]) else None
            mark = (int(data["mark"][0]), bool(data["mark"][1])) if len(data["mark"]) else None
            return cls(data["train"], data["held_out"], str(data["source"]), unscored, mark)


@dataclass(frozen=True)
class HeldOut:
    """Text that never trains: its blocks (blocks, length), and digests of the documents that filled them.

    Attributes:
        named: whether the user named it apart, so that sharing a document with the training text is a mistake.
    """

    blocks: NDArray[np.int32]
    documents: frozenset[bytes]
    named: bool

    @property
    def digest(self) -> str:
        """Of the documents, whatever their order."""
        return hashlib.sha256(b"".join(sorted(self.documents))).hexdigest()

    def without(self, documents: Iterable[Document], *, shared_is_error: bool = False) -> Iterator[Document]:
        """The documents that are not held out."""
        for document in documents:
            if _digest(document) not in self.documents:
                yield document
            elif shared_is_error:
                start = " ".join(str(document).split())[:60]
                raise DataError(
                    f"a held-out document is also in the training text: {start!r}. Give other text to --eval-data"
                )


def places(block: NDArray[np.int32], *, token: int, begins: bool) -> NDArray[np.int64]:
    """The place of each token in its document, for token ids (length,).

    >>> places(np.array([5, 1, 6, 7, 1], np.int32), token=1, begins=True).tolist()
    [0, 0, 1, 2, 0]
    >>> places(np.array([5, 1, 6, 7, 1], np.int32), token=1, begins=False).tolist()
    [0, 1, 0, 1, 2]
    """
    first = block == token
    if not begins:
        first = np.concatenate(([True], first[:-1]))
    at = np.arange(len(block))
    found: NDArray[np.int64] = at - np.maximum.accumulate(np.where(first, at, 0))
    return found


def read_held_out(
    data: DataSettings, tokenizer: Any, *, blocks: int, length: int, default: str, eval_data: str | None = None
) -> HeldOut:
    """The first ``blocks`` blocks of ``eval_data``, or of ``data`` itself.

    Raises:
        DataError: there is too little text.
        NetworkError: the source is on the Hub, which cannot be reached.
    """
    if "-" in (data.data, eval_data):
        raise DataError(
            "healing reads its text twice, which stdin cannot do. Save it to a file and give that to --data"
        )
    apart = replace(data, data=eval_data) if eval_data else data
    seen: set[bytes] = set()
    documents = _noting(read_documents(apart, seed=HELD_OUT_SEED, default=default), seen)
    rows = encode(documents, tokenizer, data, at_once=1)
    held = list(islice(joined(rows, tokenizer, data, length)[0], blocks))
    if not held:
        raise DataError(
            f"{describe(apart, default)} does not fill one block of {length} tokens. Use a smaller --max-length"
        )
    return HeldOut(np.asarray(held, np.int32), frozenset(seen), eval_data is not None)


def read_blocks(
    data: DataSettings,
    tokenizer: Any,
    held_out: HeldOut,
    *,
    train: int,
    length: int,
    seed: int,
    default: str,
    written: bool = False,
) -> Blocks:
    """Up to ``train`` blocks of documents that are not held out.

    A source that ends early gives fewer training blocks, which are then read again in another order. ``written`` says
    that the base model wrote the text: what it happens to repeat of the held-out text is left out without a word.

    Raises:
        DataError: there is too little text, or it shares documents with held-out text that was named apart.
        NetworkError: the source is on the Hub, which cannot be reached.
    """
    documents = read_documents(data, seed=seed, default=default)
    others = held_out.without(documents, shared_is_error=held_out.named and not written)
    rows = encode(others, tokenizer, data)
    packed, unscored = joined(rows, tokenizer, data, length)
    blocks = list(islice(packed, train))
    if not blocks:
        raise DataError(
            f"{describe(data, default)} has too little text: the held-out documents leave no block of {length} tokens "
            "to train on. Give more text, or use a smaller --eval-blocks or --max-length"
        )
    return Blocks(np.asarray(blocks, np.int32), held_out.blocks, describe(data, default), unscored)


def training_split(data: DataSettings, default: str) -> DataSettings:
    """C4's validation split is what profiling reads; healing trains on the other."""
    if data.data in (None, "c4") and default == "c4" and data.split is None:
        return replace(data, split="train")
    return data


def _digest(document: Document) -> bytes:
    return hashlib.blake2b(repr(document).encode(), digest_size=16).digest()


def _noting(documents: Iterable[Document], seen: set[bytes]) -> Iterator[Document]:
    for document in documents:
        seen.add(_digest(document))
        yield document
