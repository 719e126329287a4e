"""Text to fixed-length blocks, held-out documents apart from training ones. Knows nothing about models or torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmprune.calibration import DataSettings, Document, describe, read_documents
from lmprune.errors import DataError

HELD_OUT_SEED = 7
"""Held-out documents are the first in this order, whatever the run's seed, so that losses can be compared."""
_GROUP = 64


@dataclass(frozen=True)
class Blocks:
    """Packed token ids, (blocks, length) each. Every position is a real token: nothing is padded."""

    train: NDArray[np.int32]
    held_out: NDArray[np.int32]
    source: str

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
            np.savez(file, train=self.train, held_out=self.held_out, source=self.source)

    @classmethod
    def load(cls, path: Path) -> Blocks:
        """Read what `save` wrote."""
        with np.load(path) as data:
            return cls(data["train"], data["held_out"], str(data["source"]))


def read_blocks(
    data: DataSettings,
    tokenizer: Any,
    *,
    train: int,
    held_out: int,
    length: int,
    seed: int,
    default: str,
    eval_data: str | None = None,
) -> Blocks:
    """``held_out`` blocks of documents that never train, then up to ``train`` blocks of others.

    A source that ends early gives fewer training blocks, which are then read again in another order.

    Raises:
        DataError: there is too little text, or ``eval_data`` shares documents with the training text.
        NetworkError: the source is on the Hub, which cannot be reached.
    """
    if "-" in (data.data, eval_data):
        raise DataError(
            "healing reads its text twice, which stdin cannot do. Save it to a file and give that to --data"
        )
    if data.data in (None, "c4") and default == "c4" and data.split is None:
        data = replace(data, split="train")
    apart = replace(data, data=eval_data) if eval_data else data
    seen: set[bytes] = set()
    documents = _noting(read_documents(apart, seed=HELD_OUT_SEED, default=default), seen)
    held = list(islice(pack(documents, tokenizer, data, length), held_out))
    if not held:
        raise DataError(
            f"{describe(apart, default)} does not fill one block of {length} tokens. Use a smaller --max-length"
        )
    others = _without(read_documents(data, seed=seed, default=default), seen, shared_is_error=eval_data is not None)
    blocks = list(islice(pack(others, tokenizer, data, length), train))
    if not blocks:
        raise DataError(
            f"{describe(data, default)} has too little text: the held-out documents leave no block of {length} tokens "
            "to train on. Give more text, or use a smaller --eval-blocks or --max-length"
        )
    return Blocks(np.asarray(blocks, np.int32), np.asarray(held, np.int32), describe(data, default))


def pack(documents: Iterable[Document], tokenizer: Any, data: DataSettings, length: int) -> Iterator[list[int]]:
    """Documents in a row, an end-of-text token after each, cut into blocks; the rest is left out."""
    if data.chat_template and not tokenizer.chat_template:
        raise DataError("this model's tokenizer has no chat template. Leave out --chat-template")
    end = tokenizer.eos_token_id
    stream: list[int] = []
    iterator = iter(documents)
    while group := list(islice(iterator, _GROUP)):
        for row in _encode(group, tokenizer, data):
            stream += row if end is None or row[-1:] == [end] else [*row, end]
        whole = len(stream) // length * length
        yield from (stream[at : at + length] for at in range(0, whole, length))
        del stream[:whole]


def _encode(group: list[Document], tokenizer: Any, data: DataSettings) -> list[list[int]]:
    if data.chat_template:
        talks = [[{"role": "user", "content": doc}] if isinstance(doc, str) else doc for doc in group]
        return [list(tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False)) for talk in talks]
    if not all(isinstance(document, str) for document in group):
        raise DataError("the data hold conversations, not texts. Add --chat-template")
    rows: list[list[int]] = tokenizer(group, return_attention_mask=False, verbose=False)["input_ids"]
    return rows


def _digest(document: Document) -> bytes:
    return hashlib.blake2b(repr(document).encode(), digest_size=16).digest()


def _noting(documents: Iterable[Document], seen: set[bytes]) -> Iterator[Document]:
    for document in documents:
        seen.add(_digest(document))
        yield document


def _without(documents: Iterable[Document], held_out: set[bytes], *, shared_is_error: bool) -> Iterator[Document]:
    """The documents that are not held out; where the held-out text was named apart, sharing one is an error."""
    for document in documents:
        if _digest(document) not in held_out:
            yield document
        elif shared_is_error:
            start = " ".join(str(document).split())[:60]
            raise DataError(
                f"a held-out document is also in the training text: {start!r}. Give other text to --eval-data"
            )
