"""Every error that lmprune raises on purpose. The command line prints one line for each and no traceback.

LmpruneError            something the user can mend; exit code 1
├── UsageError          an option or argument is wrong; exit code 2
│   └── PlanError       a layer selection is impossible
├── ModelError          a model is missing, unreadable or not supported
├── DataError           calibration text is missing, unreadable or empty
├── RecipeError         a recipe or profile file is wrong, or belongs to another model
├── OutputError         a result cannot be written where it was asked for
├── NetworkError        the Hugging Face Hub was needed and not reached
├── HostError           mergekit, PEFT or lm-eval failed
└── VerifyError         a written checkpoint differs from what the recipe promises
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class LmpruneError(Exception):
    """Says what happened, the value, and what to do next."""

    exit_code = 1


class UsageError(LmpruneError):
    """An option or argument is wrong."""

    exit_code = 2


class PlanError(UsageError):
    """A layer selection is impossible."""


class ModelError(LmpruneError):
    """A model is missing, unreadable or not supported."""


class DataError(LmpruneError):
    """Calibration text is missing, unreadable or empty."""


class RecipeError(LmpruneError):
    """A recipe or profile file is wrong, or belongs to another model."""


class OutputError(LmpruneError):
    """A result cannot be written where it was asked for."""


class NetworkError(LmpruneError):
    """The Hugging Face Hub was needed and not reached."""


class HostError(LmpruneError):
    """mergekit, PEFT or lm-eval failed."""


class VerifyError(LmpruneError):
    """A written checkpoint differs from what the recipe promises."""


def shown(value: object, most: int = 80) -> str:
    """``value`` as a message shows it: in one line, control characters escaped, and never long.

    >>> shown("a\\nb"), len(shown("x" * 1000))
    ("'a\\\\nb'", 80)
    """
    # A part of it is enough, and all of it may be gigabytes.
    try:
        text = repr(value[:most] if isinstance(value, (str, bytes, list, tuple)) else value)
    except ValueError:  # Python spells no number of thousands of digits
        return "a number of very many digits"
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= most else f"{text[: most - 3]}..."


def sized(count: float) -> str:
    """Bytes as people read them, in the unit that suits them.

    >>> sized(999), sized(1000), sized(4_462_080), sized(999_960), sized(3e15)
    ('999 B', '1.0 kB', '4.5 MB', '1.0 MB', '3000.0 TB')
    """
    units = ("B", "kB", "MB", "GB", "TB")
    at = 0
    while at < len(units) - 1 and round(count, 1 if at else 0) >= 1000:
        count, at = count / 1000, at + 1
    return f"{count:.{min(at, 1)}f} {units[at]}"


def line_of(exc: BaseException, most: int = 300) -> str:
    """What a host says of its error, as one short line.

    >>> line_of(ValueError("no\x1bsuch\n thing"))
    'no\\x1bsuch thing'
    """
    said = " ".join(str(exc)[: 4 * most].split()) or type(exc).__name__
    said = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in said)
    return said if len(said) <= most else f"{said[: most - 3]}..."


class UselessRepair(LmpruneError):
    """A closed form made a cut no better: nothing was written."""


def is_panic(exc: BaseException) -> bool:
    """Whether a host that is written in Rust gave up, which Python's ``Exception`` does not cover."""
    return type(exc).__name__ == "PanicException"


@contextmanager
def told_as(error: type[LmpruneError], what: str) -> Iterator[None]:
    """Within the block a host reads what a user gave: whatever it raises becomes ``error``, which says ``what``.

    Hosts raise everything when a file makes no sense, from KeyError to the panics of another language. What is no
    matter of the file passes: our own errors, and memory that runs out.
    """
    try:
        yield
    except (LmpruneError, MemoryError):
        raise
    except BaseException as exc:
        if not isinstance(exc, Exception) and not is_panic(exc):
            raise
        if any(said in str(exc).lower() for said in ("out of memory", "can't allocate memory")):
            raise
        raise error(f"{what}: {line_of(exc)}") from exc


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word[:80], list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_keys(keys: Iterable[str], known: Iterable[str], where: str, error: type[LmpruneError]) -> None:
    """Refuse the first key that is not known, naming the nearest that is."""
    known = list(known)
    for key in keys:
        if key not in known:
            close = nearest(str(key), known)
            raise error(f"{where}: unknown key {shown(key)}{close}. Known keys: {', '.join(known)}")
