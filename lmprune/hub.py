"""The Hugging Face Hub: the only file that imports its client, and where its errors become ours."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from lmprune.errors import ModelError, NetworkError


def is_id(name: str) -> bool:
    """Whether ``name`` is spelled as a repository's.

    >>> is_id("Qwen/Qwen3-0.6B"), is_id("./folder/model"), is_id("demo")
    (True, False, False)
    """
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def split_revision(name: str) -> tuple[str, str | None]:
    """``org/model@revision`` -> (``org/model``, ``revision``); any other name, and None."""
    model, at, revision = name.rpartition("@")
    return (model, revision) if at and revision and is_id(model) else (name, None)


def snapshot(repository: str, revision: str | None, patterns: Sequence[str], *, fetch: bool = True) -> Path:
    """The folder in the Hub's cache that holds the wanted files of ``repository``; without ``fetch``, only if it does.

    Raises:
        ModelError: there is no such repository or revision, or no access to it.
        NetworkError: the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    with _in_our_words(repository, revision):
        wanted = list(patterns)
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted, local_files_only=not fetch))


def commit_of(folder: Path) -> str | None:
    """The commit that a `snapshot` is of."""
    return folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


@contextmanager
def _in_our_words(repository: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError as exc:
        raise ModelError(f"{repository} is gated on the Hub: accept its terms there, then run `hf auth login`") from exc
    except RevisionNotFoundError as exc:
        raise ModelError(f"{repository} has no revision {revision!r} on the Hub") from exc
    except RepositoryNotFoundError as exc:
        raise ModelError(f"no folder {repository!r} here, and no such repository on the Hub (or no access)") from exc
    except (OSError, *unreachable()) as exc:  # type: ignore[misc]  # mypy takes no tuple that is unpacked
        raise NetworkError(
            f"{repository!r} is no folder here, and the Hugging Face Hub cannot be reached to fetch it. "
            "Check the network, or give a local folder"
        ) from exc


def unreachable() -> tuple[type[Exception], ...]:
    """What the client, and all that stands on it, raise where the Hub cannot be reached."""
    from huggingface_hub import get_session
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    transport: Any = import_module(type(get_session()).__module__.partition(".")[0])  # httpx, or httpx2 of late
    hubs = (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled)
    return (ConnectionError, TimeoutError, transport.HTTPError, *hubs)


def check_reachable() -> None:
    """Return at once where the Hub answers; datasets itself would try for half a minute.

    Raises:
        One of `unreachable`.
    """
    from huggingface_hub import constants, get_session

    get_session().head(constants.ENDPOINT, timeout=10)
