"""Printing: results go to stdout, progress and remarks to stderr."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

GAP = 2
"""Spaces between columns."""
LEAST_TEXT = 30
"""Width from which a column of sentences is worth reading."""


class _Answer(NamedTuple):
    command: str
    as_json: bool


_NONE = _Answer("", False)
_answer: ContextVar[_Answer] = ContextVar("answer", default=_NONE)
VERSION = 1
"""Of the shape that docs/json.md describes."""


@contextmanager
def answering(command: str, as_json: bool) -> Iterator[None]:
    """Within the block, `result` prints for ``command``."""
    token = _answer.set(_Answer(command, as_json))
    try:
        yield
    finally:
        _answer.reset(token)


def as_json() -> bool:
    """Whether a program reads the result of the command that runs."""
    return _answer.get().as_json


def result(text: str, data: Mapping[str, Any]) -> None:
    """Print ``data`` as JSON where a program reads it, ``text`` otherwise; of several processes, the first does."""
    if not _first():
        return
    command, wants_json = _answer.get()
    if wants_json:
        whole = {"format": f"lmprune-{command}", "version": VERSION} | {**data}
        text = json.dumps(plain(whole), indent=2, ensure_ascii=False, allow_nan=False)
    print(text)


def plain(value: Any) -> Any:
    """``value`` as JSON knows it: a path as its name, and no number that is none."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def measured(value: float | None, error: float | None) -> dict[str, float | None]:
    """A number with its standard error; None where that is not known."""
    return {"value": value, "error": error}


def remark(text: str) -> None:
    """A line for the person who waits."""
    logging.getLogger("lmprune.cli").info(text)


@contextmanager
def speaking() -> Iterator[None]:
    """Within the block, what the library logs is printed to stderr; of several processes, only the first says how far
    it is. Within another such block nothing is said twice."""
    logger, handler = logging.getLogger("lmprune"), _Stderr()
    if any(isinstance(other, _Stderr) for other in logger.handlers):
        yield
        return
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if _first() else logging.WARNING)
    logger.propagate = False  # the harness gives the root logger a handler of its own, which would say it again
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


class _Stderr(logging.Handler):
    """Prints the message alone, above a progress bar that is on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            tqdm.write(record.getMessage(), file=sys.stderr)
        else:
            print(record.getMessage(), file=sys.stderr)
        sys.stderr.flush()


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False, text: bool = False) -> str:
    """Aligned columns, as wide as the terminal, or 80 where stdout is none.

    Heads break between words. What does not fit beside one another stands below, with the first column again.

    Args:
        numbers: align all columns but the first to the right.
        text: the last column holds sentences, which may break too.
    """
    least = [max(_least(title), *(len(row[i]) for row in rows)) for i, title in enumerate(head)]
    if text:
        least[-1] = min(least[-1], LEAST_TEXT)
    # A name without end takes half of the line, and what stands beside it the rest, in as many lines as it needs.
    least[0] = min(least[0], width() // 2)
    least[1:] = [min(wide, width() - GAP - least[0]) for wide in least[1:]]
    wanted = [max(len(title), *(len(row[i]) for row in rows)) for i, title in enumerate(head)]
    return "\n\n".join(_aligned(head, rows, _widths(least, wanted, part), numbers) for part in _beside(least, width()))


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """A word and what it says, in two columns without heads; what is said breaks between words."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, show_header=False)
    shown.add_column(style="bold")
    shown.add_column()
    for word, said in rows:
        shown.add_row(Text(word), Text(said))
    return render(shown)


def _least(title: str) -> int:
    """Width of a head that is broken between words; one that begins with spaces wants them."""
    return len(title) if title.startswith(" ") else max((len(word) for word in title.split()), default=0)


def _beside(least: Sequence[int], width: int) -> list[list[int]]:
    """The columns of each block: the first of all, and as many of the others as fit."""
    parts: list[list[int]] = [[0]]
    used = least[0]
    for i, wanted in enumerate(least[1:], 1):
        if used + GAP + wanted > width and len(parts[-1]) > 1:
            parts.append([0])
            used = least[0]
        parts[-1].append(i)
        used += GAP + wanted
    return parts


def _widths(least: Sequence[int], wanted: Sequence[int], part: Sequence[int]) -> dict[int, int]:
    """Column -> its width: what is left over goes to those that want more, from the left."""
    spare = width() - sum(least[i] + GAP for i in part) + GAP
    found = {}
    for i in part:
        more = max(0, min(spare, wanted[i] - least[i]))
        found[i] = least[i] + more
        spare -= more
    return found


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]], widths: dict[int, int], numbers: bool) -> str:
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
    for i, wide in widths.items():
        justify: Literal["left", "right"] = "right" if numbers and i else "left"
        # Given, since rich would take from all columns alike, or drop the last.
        shown.add_column(
            Text(head[i]), justify=justify, vertical="bottom" if numbers else "top", width=wide, overflow="fold"
        )
    for row in rows:
        shown.add_row(*(Text(row[i]) for i in widths))
    return render(shown)


def width() -> int:
    """Columns to fill."""
    return shutil.get_terminal_size((80, 24)).columns if sys.stdout.isatty() else 80


def render(*parts: Any) -> str:
    """Parts of rich as text; in colour on a terminal, unless ``NO_COLOR`` is set."""
    from rich.console import Console

    plain = not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))
    console = Console(file=sys.stdout, width=width(), color_system=None if plain else "auto", highlight=False)
    with console.capture() as captured:
        console.print(*parts, sep="\n")
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
