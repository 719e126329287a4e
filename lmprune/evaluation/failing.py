"""The harness's errors in our words: the one place where they are told apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lmprune.errors import HostError, LmpruneError, NetworkError, UsageError
from lmprune.evaluation import LIST_TASKS
from lmprune.hub import unreachable

# What the harness raises by itself; anything else is a bug and keeps its traceback.
_THEIRS = (KeyError, ValueError, TypeError, AssertionError, RuntimeError, OSError, ImportError)


@contextmanager
def in_our_words(task: str | None = None) -> Iterator[None]:
    """Within the block, an error of the harness becomes one of ours.

    Args:
        task: what is being loaded, if only that.

    Raises:
        UsageError: there is no such task.
        NetworkError: the data of ``task`` are not here and cannot be fetched.
        HostError: anything else.
    """
    try:
        yield
    except LmpruneError:
        raise
    except (*_THEIRS, *unreachable()) as exc:  # type: ignore[misc]  # mypy takes no tuple that is unpacked
        raise _ours(exc, " ".join(str(exc).split()), task) from exc


def _ours(error: Exception, line: str, task: str | None) -> LmpruneError:
    # A data set that the Hub does not know, or that is not here while offline, is a FileNotFoundError too.
    away = isinstance(error, (FileNotFoundError, *unreachable())) or "offline" in line.lower()
    if task is not None and away:
        return NetworkError(
            f"task {task!r} needs data that are not on this machine, and the Hugging Face Hub cannot be reached "
            f"({line[:300]}). Go online once, or choose tasks with local data such as lmprune_demo"
        )
    if task is not None:
        return HostError(f"lm_eval cannot load task {task!r}: {type(error).__name__}: {line[:300]}")
    if isinstance(error, ValueError):
        if "asks not found" in line or "Tasks were not found" in line:
            return UsageError(f"{line[:300]}. See {LIST_TASKS}")
        return HostError(f"lm_eval: {line[:400]}")  # written for people; the others need their names
    return HostError(f"lm_eval: {type(error).__name__}: {line[:400]}")
