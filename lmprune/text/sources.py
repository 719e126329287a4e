"""Calibration text and its tokens. Knows nothing about models; torch and datasets are imported only when needed.

A *sample* is one row of token ids without padding. Documents are drawn in a seeded order that depends on nothing but
the seed and the source, so that the same command gives the same tokens on every machine:

- files, Hub datasets and stdin pass through a shuffle window of 10,000 documents (a whole shuffle of smaller sources);
- the demo world is a generator, and its seed is the order.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lmprune.errors import DataError, NetworkError
from lmprune.settings import option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Document = str | list[dict[str, Any]]
"""A text, or the messages of one conversation."""

C4 = ("allenai/c4", "en", "validation")
"""The calibration set of the paper (arXiv 2403.17887): repository, configuration, split."""

WINDOW = 10_000
SUFFIXES = (".txt", ".jsonl", ".parquet")
_READ_AT_ONCE = 64


@dataclass(frozen=True)
class DataSettings:
    """Where calibration text comes from and how documents become samples."""

    data: str | None = option(
        None,
        "Calibration text: c4, demo, a Hub dataset id, a dataset folder, a .txt, .jsonl or .parquet file (also .gz), "
        "or - for stdin. Default: c4, and demo for the demo model.",
        metavar="SRC",
    )
    split: str | None = option(None, "Split of a dataset. Default: train; for c4, validation.")
    column: str | None = option(None, "Column that holds the text. Default: text.")
    config: str | None = option(None, "Configuration (subset) of a Hub dataset. Default: its own.")
    pack: bool = option(
        False,
        "Join documents into samples of exactly --max-length tokens, or one document a sample.",
        flag="--pack/--no-pack",
    )
    chat_template: bool = option(
        False,
        "Write each document as a conversation by the tokenizer's template.",
        flag="--chat-template/--no-chat-template",
    )


@dataclass(frozen=True)
class Tokens:
    """Samples of token ids, ``rows[i]`` of shape (length,), and where they came from."""

    rows: tuple[NDArray[np.int32], ...]
    source: str = "caller"
    settings: DataSettings = field(default_factory=DataSettings)

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
        return "sha256:" + digest.hexdigest()

    def take(self, samples: int) -> Tokens:
        """The first ``samples`` samples."""
        return Tokens(self.rows[:samples], self.source, self.settings)


def read_texts(settings: DataSettings, *, seed: int, default: str = "c4") -> Iterator[str]:
    """Documents of the source in seeded order; endless for ``demo``.

    Raises:
        DataError: the source is missing, unreadable, empty or holds conversations instead of text.
        NetworkError: the source is on the Hub, which cannot be reached.
    """
    for document in read_documents(settings, seed=seed, default=default):
        if not isinstance(document, str):
            raise DataError(f"{describe(settings, default)} holds conversations, not texts. Add --chat-template")
        yield document


def read_documents(settings: DataSettings, *, seed: int, default: str = "c4") -> Iterator[Document]:
    """As `read_texts`, but conversations are passed on as lists of messages. Blank documents are left out."""
    source = settings.data or default
    if source == "demo":
        from lmprune.text.world import documents

        yield from documents(f"calibration-{seed}")
        return
    found = False
    for document in shuffled((item for item in _source(source, settings) if item), seed):
        found = True
        yield document
    if not found:
        raise DataError(f"{describe(settings, default)} holds no text. Give another source with --data")


def describe(settings: DataSettings, default: str = "c4") -> str:
    """The source in words, for results and messages: ``allenai/c4 en validation``."""
    source = settings.data or default
    if source == "c4":
        source, config, split = C4
        return " ".join((source, settings.config or config, settings.split or split))
    if source == "-":
        return "stdin"
    named = (settings.config, settings.split, settings.column)
    return " ".join((source, *(name for name in named if name)))


def shuffled(items: Iterable[Document], seed: int, window: int = WINDOW) -> Iterator[Document]:
    """Seeded order within a moving window: a uniform shuffle of sources that fit in it."""
    # Our own and not datasets' shuffle: its order has changed between releases, and this one's cannot.
    rng = random.Random(f"lmprune-shuffle-{seed}")
    iterator = iter(items)
    waiting = list(islice(iterator, window))
    for item in iterator:
        place = rng.randrange(len(waiting))
        yield waiting[place]
        waiting[place] = item
    rng.shuffle(waiting)
    yield from waiting


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
        DataError: as `read_texts`; or no sample comes out; or the tokenizer has no chat template but one is asked for.
        NetworkError: as `read_texts`.
    """
    source = describe(settings, default)
    if settings.chat_template and not tokenizer.chat_template:
        raise DataError("this model's tokenizer has no chat template. Leave out --chat-template")
    rows = _encoded(settings, tokenizer, read_documents(settings, seed=seed, default=default), max_length, source)
    if settings.pack:
        rows = _packed(rows, tokenizer.eos_token_id, max_length)
    taken = tuple(np.asarray(row, dtype=np.int32) for row in islice(rows, samples))
    if not taken:
        few = f" even one sample of {max_length} tokens. Use --no-pack or a smaller --max-length"
        raise DataError(f"{source} does not fill{few}" if settings.pack else f"{source} holds no tokens")
    return Tokens(taken, source, settings)


def _encoded(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterator[Document],
    max_length: int,
    source: str,
) -> Iterator[list[int]]:
    limit = None if settings.pack else max_length
    while group := list(islice(documents, _READ_AT_ONCE)):
        if settings.chat_template:
            talks = [[{"role": "user", "content": doc}] if isinstance(doc, str) else doc for doc in group]
            encoded = [list(tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False)) for talk in talks]
        else:
            if not all(isinstance(document, str) for document in group):
                raise DataError(f"{source} holds conversations, not texts. Add --chat-template")
            # Lengths beyond the tokenizer's own limit are cut below, so its warning about them is of no use.
            encoded = tokenizer(group, return_attention_mask=False, verbose=False)["input_ids"]
        yield from (row[:limit] for row in encoded if row)


def _packed(rows: Iterator[list[int]], end: int | None, length: int) -> Iterator[list[int]]:
    """Documents in a row, an end-of-text token after each, cut into samples of ``length``; the rest is left out."""
    stream: list[int] = []
    for row in rows:
        stream += row if end is None or row[-1] == end else [*row, end]
        while len(stream) >= length:
            yield stream[:length]
            del stream[:length]


# --- sources ------------------------------------------------------------------------------------------------------


def _source(source: str, settings: DataSettings) -> Iterator[Document]:
    if source == "-":
        return _paragraphs(sys.stdin, "stdin")
    path = Path(source).expanduser()
    if path.is_file():
        return _file(path, settings)
    if (
        source != "c4"
        and not path.is_dir()
        and (path.suffix in (*SUFFIXES, ".gz") or source.startswith((".", "/", "~")))
    ):
        raise DataError(f"no file {source!r}. Give c4, demo, a Hub dataset id, or a {', '.join(SUFFIXES)} file")
    return _dataset(source, settings)


def _file(path: Path, settings: DataSettings) -> Iterator[Document]:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind not in SUFFIXES or (kind == ".parquet" and path.suffix == ".gz"):
        raise DataError(f"{path}: unknown kind of file. Give {', '.join(SUFFIXES)}, or .txt.gz, .jsonl.gz")
    try:
        if kind == ".parquet":
            yield from _parquet(path, settings.column)
            return
        with _open(path) as file:
            yield from _paragraphs(file, str(path)) if kind == ".txt" else _json_lines(file, path, settings.column)
    except UnicodeDecodeError as exc:
        raise DataError(f"{path} is not UTF-8 text: byte {exc.start} cannot be read") from exc
    except (OSError, EOFError) as exc:
        raise DataError(f"cannot read {path}: {getattr(exc, 'strerror', None) or exc}") from exc


def _open(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _paragraphs(file: Iterable[str], name: str) -> Iterator[Document]:
    """A document is what stands between blank lines."""
    lines: list[str] = []
    try:
        for line in file:
            if line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines).strip()
                lines = []
    except UnicodeDecodeError as exc:
        raise DataError(f"{name} is not UTF-8 text: byte {exc.start} cannot be read") from exc
    if lines:
        yield "".join(lines).strip()


def _json_lines(file: Iterable[str], path: Path, column: str | None) -> Iterator[Document]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as exc:
            raise DataError(f"{path}, line {number}: not JSON ({exc}). A .jsonl file holds one object a line") from exc
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: not a JSON object but {line.strip()[:40]!r}")
        yield _cell(row, column, f"{path}, line {number}")


def _parquet(path: Path, column: str | None) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        _cell(dict.fromkeys(names, ""), column, str(path))
        for batch in table.iter_batches(columns=[column or "text"]):
            yield from (_cell(row, column, str(path)) for row in batch.to_pylist())
    except pyarrow.ArrowInvalid as exc:
        raise DataError(f"{path} is not a parquet file: {exc}") from exc


def _cell(row: Mapping[str, Any], column: str | None, where: str) -> Document:
    """The document in a row: a text, or a list of messages."""
    name = column or "text"
    if name not in row:
        raise DataError(f"{where}: no column {name!r}. Choose one with --column: {', '.join(map(str, row)) or 'none'}")
    value = row[name]
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list) and all(isinstance(item, dict) and {"role", "content"} <= set(item) for item in value):
        return value
    raise DataError(f"{where}: the column {name!r} holds {type(value).__name__}, not text. Choose one with --column")


def _dataset(source: str, settings: DataSettings) -> Iterator[Document]:
    """A Hub dataset or a folder of data files, streamed."""
    import datasets
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    session = get_session()
    client: Any = import_module(type(session).__module__.partition(".")[0])  # httpx, or httpx2 in newer releases
    name, config, split = (source, settings.config, settings.split or "train")
    if source == "c4":
        name, config, split = C4[0], settings.config or C4[1], settings.split or C4[2]
    try:
        if not Path(name).expanduser().is_dir():
            session.head(constants.ENDPOINT, timeout=10)  # datasets itself tries for half a minute
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for row in rows:
            yield _cell(row, settings.column, name)
    except (
        ConnectionError,
        TimeoutError,
        client.HTTPError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    ) as exc:
        raise NetworkError(
            f"the dataset {name!r} is on the Hugging Face Hub, which cannot be reached. "
            "Check the network or give --data FILE"
        ) from exc
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as exc:
        raise DataError(f"no dataset {name!r} on the Hub or here: {_first_line(exc)}") from exc
    except (ValueError, OSError) as exc:
        raise DataError(f"the dataset {name!r} cannot be read: {_first_line(exc)}") from exc


def _first_line(exc: BaseException) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0]
