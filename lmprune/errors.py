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
from collections.abc import Iterable


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


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_keys(keys: Iterable[str], known: Iterable[str], where: str, error: type[LmpruneError]) -> None:
    """Refuse the first key that is not known, naming the nearest that is."""
    known = list(known)
    for key in keys:
        if key not in known:
            raise error(f"{where}: unknown key {key!r}{nearest(str(key), known)}. Known keys: {', '.join(known)}")
