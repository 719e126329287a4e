"""Calibration text: documents of every kind of source. The only importer of datasets, and of that when it is needed.

Documents are drawn in a seeded order that depends on nothing but the seed and the source, so that the same command
gives the same text on every machine:

- files, Hub datasets and stdin pass through a shuffle window of 10,000 documents (a whole shuffle of smaller sources);
- the demo world is a generator, and its seed is the order.
"""

from __future__ import annotations

import gzip
import json
import logging
import random
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, ClassVar

from lmprune.errors import DataError, NetworkError, line_of, shown
from lmprune.files import as_path
from lmprune.hub import check_reachable, unreachable
from lmprune.settings import option

Document = str | list[dict[str, Any]]
"""A text, or the messages of one conversation."""

C4 = ("allenai/c4", "en", "validation")
"""The calibration set of the paper (arXiv 2403.17887): repository, configuration, split."""

WINDOW = 10_000
LONGEST = 1 << 15
"""Characters of a document in plain text; a longer stretch without a blank line counts as several documents."""
LONGEST_LINE = 1 << 26
"""Characters of one line of a .jsonl file."""
SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class DataSettings:
    """Where calibration text comes from and how documents become samples."""

    PANEL: ClassVar[str] = "Text"

    data: str | None = option(
        None,
        "Calibration text: c4, demo, a Hub dataset id, a dataset folder, a .txt, .jsonl or .parquet file (also .gz), "
        "or - for stdin. Default: c4, and demo for the demo model.",
        metavar="SRC",
    )
    split: str | None = option(None, "Split of a dataset. Default: train; for c4, validation.")
    column: str | None = option(None, "Column that holds the text. Default: text.")
    config: str | None = option(None, "Configuration (subset) of a Hub dataset. Default: its own.")
    pack: bool | None = option(
        None,
        "Join documents into samples of exactly --max-length tokens, or one document a sample. Healing always joins.",
        flag="--pack/--no-pack",
    )
    bos: bool | None = option(
        None,
        "Begin what is joined with the token that begins a text. Default: where the tokenizer does so.",
        flag="--bos/--no-bos",
    )
    chat_template: bool = option(
        False,
        "Write each document as a conversation by the tokenizer's template.",
        flag="--chat-template/--no-chat-template",
    )

    def check(self) -> None:
        """Make sure of what can be known before anything is read.

        Raises:
            DataError: the file is not there, or an option says nothing of such a source.
        """
        if self.data is not None:
            _check_used(self.data, self)
            _check_there(self.data)


def read_documents(settings: DataSettings, *, seed: int, default: str = "c4") -> Iterator[Document]:
    """Documents of the source in seeded order, blank ones left out; endless for ``demo``.

    Raises:
        DataError: the source is missing, unreadable or empty.
        NetworkError: the source is on the Hub, which cannot be reached.
    """
    source = settings.data or default
    _check_used(source, settings)
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


def _check_used(source: str, settings: DataSettings) -> None:
    """Refuse what says nothing of such a source.

    Raises:
        DataError: naming the option.
    """
    file = source in ("demo", "-") or as_path(source).is_file()
    unused: tuple[str, ...] = ("split", "config") if file else ()
    if source in ("demo", "-") or ".txt" in Path(source).suffixes:
        unused = ("split", "config", "column")
    for name in unused:
        if getattr(settings, name) is not None:
            raise DataError(f"--{name} {getattr(settings, name)} has no effect on --data {source}. Leave it out")


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


# --- sources ------------------------------------------------------------------------------------------------------


def _source(source: str, settings: DataSettings) -> Iterator[Document]:
    if source == "-":
        return _paragraphs(sys.stdin, "stdin")
    path = as_path(source)
    if path.is_file():
        return _file(path, settings)
    _check_there(source)
    return _dataset(source, settings)


def _check_there(source: str) -> None:
    """Refuse what names a file that is not there.

    Raises:
        DataError: naming it.
    """
    path = Path(source).expanduser()
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataError(f"{source!r} is a device or a pipe. Give a plain file, or - for what is piped in")
    named = path.suffix in (*SUFFIXES, ".gz") or source.startswith((".", "/", "~")) or path.parent.is_file()
    if named and not path.exists():
        raise DataError(f"no file {source!r}. Give c4, demo, a Hub dataset id, or a {', '.join(SUFFIXES)} file")


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
    except (OSError, EOFError, zlib.error) as exc:
        raise DataError(f"cannot read {path}: {getattr(exc, 'strerror', None) or exc}") from exc


def _open(path: Path) -> IO[str]:
    # A byte order mark at the head of a file is no text.
    return gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else path.open(encoding="utf-8-sig")


def _paragraphs(file: IO[str], name: str) -> Iterator[Document]:
    """A document is what stands between blank lines; a window of it where that is longer than `LONGEST`."""
    text, begun, told = "", False, False
    for part in _lines(file, name):
        if not part.strip() and not begun:
            if text.strip():
                yield text.strip()
            text = ""
            continue
        text, begun = text + part, not part.endswith("\n")
        while len(text) > LONGEST:
            if not told:
                logging.getLogger("lmprune").info(_LONG, name, LONGEST)
            told = True
            # Between words, where there are any.
            at = max(text.rfind(" ", LONGEST // 2, LONGEST), text.rfind("\n", LONGEST // 2, LONGEST)) + 1 or LONGEST
            if window := text[:at].strip():
                yield window
            text = text[at:]
    if text.strip():
        yield text.strip()


_LONG = "%s: stretches without a blank line, which ends a document, count as documents of %d characters at most"


def _lines(file: IO[str], name: str) -> Iterator[str]:
    """Lines, those that are longer than a document may be in parts."""
    try:
        yield from iter(partial(file.readline, LONGEST), "")
    except UnicodeDecodeError as exc:
        raise DataError(f"{name} is not UTF-8 text: byte {exc.start} cannot be read") from exc


def _json_lines(file: IO[str], path: Path, column: str | None) -> Iterator[Document]:
    for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE), ""), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        if len(line) == LONGEST_LINE:
            raise DataError(f"{where}: longer than {LONGEST_LINE >> 20} MiB. A .jsonl file holds one object a line")
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise DataError(f"{where}: not JSON ({str(exc)[:120]}). A .jsonl file holds one object a line") from exc
        if not isinstance(row, dict):
            raise DataError(f"{where}: not a JSON object but {shown(line.strip(), 40)}")
        yield _cell(row, column, where)


def _parquet(path: Path, column: str | None) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Page by page: a group of rows may be the whole file.
        table = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        names = table.schema_arrow.names
        _cell(dict.fromkeys(names, ""), column, str(path))
        _check_packing(table.metadata, column or "text", path)
        for batch in table.iter_batches(_ROWS, columns=[column or "text"], use_threads=False):
            yield from (_cell(row, column, str(path)) for row in batch.to_pylist())
    except pyarrow.ArrowException as exc:
        raise DataError(f"{path} is not a parquet file: {line_of(exc)}") from exc


def _check_packing(metadata: Any, column: str, path: Path) -> None:
    """Refuse a file of which little becomes very much, before any of it is unpacked.

    Raises:
        DataError: it is one.
    """
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            size, packed = chunk.total_uncompressed_size, max(1, chunk.total_compressed_size)
            if chunk.path_in_schema.partition(".")[0] != column or size < LONGEST_LINE:
                continue
            if size > LONGEST_LINE * max(1, group.num_rows) or size > _PACKED * packed:
                raise DataError(
                    f"{path}: the column {shown(column)} unpacks {packed >> 10:,} KiB to {size >> 20:,} MiB in "
                    f"{group.num_rows:,} rows, which is no text. Give another file"
                )


_ROWS = 64
"""That are read at once."""
_PACKED = 200
"""How many times its packed size a column may have; text has some five times."""


def _cell(row: Mapping[str, Any], column: str | None, where: str) -> Document:
    """The document in a row: a text, or a list of messages."""
    name = column or "text"
    if name not in row:
        raise DataError(f"{where}: no column {name!r}. Choose one with --column: {_names(row)}")
    value = row[name]
    if value is None:
        return ""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as exc:
        raise DataError(f"{where}: the column {name!r} holds half of a character (a lone surrogate). Mend it") from exc
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list) and value and all(map(_is_message, value)):
        return value
    raise DataError(f"{where}: the column {name!r} holds {type(value).__name__}, not text. Choose one with --column")


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("role", "content"))


def _names(row: Mapping[str, Any]) -> str:
    """A row's columns, as a message shows them."""
    return ", ".join(shown(name, 40).strip("'") for name in list(row)[:12]) or "none"


def _dataset(source: str, settings: DataSettings) -> Iterator[Document]:
    """A Hub dataset or a folder of data files, streamed."""
    import datasets

    name, config, split = (source, settings.config, settings.split or "train")
    if source == "c4":
        name, config, split = C4[0], settings.config or C4[1], settings.split or C4[2]
    try:
        if not as_path(name).is_dir():
            check_reachable()
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for row in rows:
            yield _cell(row, settings.column, name)
    except unreachable() as exc:
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
