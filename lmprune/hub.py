"""The Hugging Face Hub: the only file that imports its client, and where its errors become ours."""

from __future__ import annotations

import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from lmprune.errors import HostError, ModelError, NetworkError, UsageError, nearest, shown, sized

T = TypeVar("T")
TAG = "lmprune"
"""By which repositories of ours are found."""
SMALL = 4 << 20
"""Bytes of a recipe, a config or a history from the Hub, at most."""
_ATTEMPTS, _LONGEST_WAIT = 5, 300
_OURS = re.compile(
    r"(\.eval_results|pictures|report-pictures)/.+|report\.md|profile\.json|mergekit_config\.yml"
    r"|(lmprune/)?[\w.-]+\.(patch|width)\.safetensors"
)
"""What an earlier push may have left and a later one may not have; other files are never removed."""
_say = logging.getLogger("lmprune").info


def is_id(name: str) -> bool:
    """Whether ``name`` is spelled as a repository's.

    >>> is_id("Qwen/Qwen3-0.6B"), is_id("./folder/model"), is_id("demo"), is_id("a/..")
    (True, False, False, False)
    """
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and ".." not in name


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


def small(repository: str, revision: str | None, names: Sequence[str], most: int = SMALL) -> Path:
    """As `snapshot`, of files that anyone may have written: none is fetched that is said to be larger than ``most``.

    Nor is more taken where a file turns out larger than was said: the transfer ends there.

    Raises:
        ModelError: naming the file and its size; and as `snapshot`.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    with _in_our_words(repository, revision):
        try:
            listed = snapshot_download(
                repository, revision=revision, allow_patterns=list(names), tqdm_class=_counting(most), dry_run=True
            )
        except (DryRunError, *unreachable()):  # type: ignore[misc]  # told below, unless the files are here already
            listed = []
        for file in listed:
            if (file.file_size or 0) > most:
                raise ModelError(f"{repository}: {_too_large(file.filename, file.file_size, most)}")
        try:
            found = snapshot_download(
                repository, revision=revision, allow_patterns=list(names), tqdm_class=_counting(most * len(names))
            )
        except _MoreThanSaid as exc:
            raise ModelError(f"{repository}: {_too_large(' or '.join(names), None, most)}") from exc
    return Path(found)


def _too_large(name: str, size: int | None, most: int) -> str:
    said = "sends more than it says" if size is None else f"is {sized(size)}"
    return f"{name} {said}, and such a file is at most {sized(most)}. It was not fetched"


class _MoreThanSaid(Exception):
    """A transfer passed its limit."""


def _counting(most: int) -> Any:
    """A bar that shows nothing, and ends a transfer of more than ``most`` bytes."""
    from tqdm import tqdm

    class Counting(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self.seen = 0.0

        def update(self, n: float | None = 1) -> bool | None:
            self.seen += n or 0
            if self.seen > most:
                raise _MoreThanSaid
            return super().update(n)

    return Counting


def commit_of(folder: Path) -> str | None:
    """The commit that a `snapshot` is of."""
    return folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


def tagged(words: str = "", most: int = 100) -> list[dict[str, Any]]:
    """Model repositories of ours, the most downloaded first: ``id``, ``downloads`` and the ``models`` they cut.

    Raises:
        NetworkError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        found = list(HfApi().list_models(filter=TAG, search=words or None, sort="downloads", limit=most))
    except (OSError, *unreachable()) as exc:  # type: ignore[misc]  # mypy takes no tuple that is unpacked
        raise NetworkError("the Hugging Face Hub cannot be reached") from exc
    prefix = "base_model:"
    return [
        {
            "id": one.id,
            "downloads": one.downloads,
            "models": sorted({t.rpartition(":")[2] for t in one.tags or () if t.startswith(prefix)}),
        }
        for one in found
    ]


@contextmanager
def _in_our_words(repository: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError as exc:
        raise ModelError(f"{repository} is gated on the Hub: accept its terms there, then run `hf auth login`") from exc
    except RevisionNotFoundError as exc:
        close = nearest(str(revision), _revisions(repository))
        raise ModelError(f"{repository} has no revision {revision!r} on the Hub{close}") from exc
    except RepositoryNotFoundError as exc:
        raise ModelError(f"no folder {repository!r} here, and no such repository on the Hub (or no access)") from exc
    except (OSError, *unreachable()) as exc:  # type: ignore[misc]  # mypy takes no tuple that is unpacked
        raise NetworkError(
            f"{repository!r} is no folder here, and the Hugging Face Hub cannot be reached to fetch it. "
            "Check the network, or give a local folder"
        ) from exc


def _revisions(repository: str) -> list[str]:
    """Branches and tags; none where that cannot be told."""
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(repository)
    except (OSError, *unreachable()):  # type: ignore[misc]  # mypy takes no tuple that is unpacked
        return []
    return [ref.name for ref in (*refs.branches, *refs.tags)]


# --- pushing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pushed:
    """Where a push went: the repository's page, the commit, the pull request's page, and whether anything changed."""

    url: str
    commit: str
    pull_request: str | None
    changed: bool


def check_id(repository: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        UsageError: with the client's words.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if repository.count("/") != 1 or not is_id(repository):
        raise UsageError(f"{shown(repository)} is no name of a repository. Give user/name, as in ada/llama-2-7b-pruned")
    try:
        validate_repo_id(repository)
    except HFValidationError as exc:
        raise UsageError(f"{shown(repository)} is no name of a repository: {' '.join(str(exc).split())[:200]}") from exc


def tokens() -> tuple[str, ...]:
    """The user's token, if there is one: to be looked for in whatever leaves this machine."""
    from huggingface_hub import get_token

    found = get_token()
    return (found,) if found else ()


def push(
    folder: Path, files: Sequence[str], repository: str, *, message: str, private: bool = False, create_pr: bool = False
) -> Pushed:
    """Bring ``files`` of ``folder`` into the model repository ``repository``, in one commit, and make it if need be.

    Files that are there already are not sent again. Large ones are sent before the commit, so that what breaks in the
    middle leaves the repository as it was, and the same call again completes it.

    Raises:
        UsageError: there is no token, or the repository is not one of ours.
        HostError: the Hub refuses; in its words.
        NetworkError: it cannot be reached, or does not get well in `_ATTEMPTS` attempts.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    check_id(repository)
    if not tokens():
        raise UsageError("no token for the Hub: run `hf auth login`, or set HF_TOKEN to one that may write")
    api = HfApi()
    with _pushing(repository):
        if not create_pr:
            _patiently(lambda: api.create_repo(repository, private=private or None, exist_ok=True))
        info = _patiently(lambda: api.model_info(repository))
        there = [str(file.rfilename) for file in info.siblings or ()]
        _check_ours(repository, info, there, files, private=private, create_pr=create_pr)
        stale = [name for name in there if _OURS.fullmatch(name) and name not in files]

        def commit() -> Any:
            operations: list[Any] = [CommitOperationAdd(name, str(folder / name)) for name in files]
            operations += [CommitOperationDelete(name) for name in stale]
            with warnings.catch_warnings(), _without_its_words():
                warnings.simplefilter("ignore")  # of the card, which the Hub's page shows as well
                return api.create_commit(
                    repository, operations, commit_message=message, create_pr=create_pr or None,
                    parent_commit=None if create_pr else info.sha,
                )  # fmt: skip

        done = _patiently(lambda: _by_what_the_hub_speaks(commit))
    return Pushed(f"{api.endpoint}/{repository}", str(done.oid), done.pr_url, done.oid != info.sha)


def _by_what_the_hub_speaks(commit: Callable[[], T]) -> T:
    """``commit`` by Xet, which the client takes for large files, and by LFS where the Hub has no Xet, as mirrors."""
    from huggingface_hub import constants

    try:
        return commit()
    except (OSError, *unreachable()) as exc:  # type: ignore[misc]  # mypy takes no tuple that is unpacked
        if "404" not in str(exc) or "/xet-write-token/" not in str(exc):
            raise
    _say("the Hub does not speak Xet: large files go by LFS")
    before, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
    try:
        return commit()
    finally:
        constants.HF_HUB_DISABLE_XET = before


@contextmanager
def _without_its_words() -> Iterator[None]:
    """Within the block, the client logs errors only: that nothing has changed we say ourselves."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _check_ours(
    repository: str, info: Any, there: Sequence[str], files: Sequence[str], *, private: bool, create_pr: bool
) -> None:
    """Refuse to write over what is not ours.

    Raises:
        UsageError: naming what stands there.
    """
    foreign = [name for name in there if name != ".gitattributes"]
    if foreign and TAG not in (info.tags or ()) and not create_pr:
        raise UsageError(
            f"{repository} exists and holds {shown(foreign[0])}, which is not of lmprune. Choose another name, or "
            "propose the change with --create-pr"
        )
    if private and not info.private:
        raise UsageError(f"{repository} exists and is public. Make it private in its settings, or choose another name")
    weights, given = (
        [n for n in names if n.endswith(".safetensors") and not _OURS.fullmatch(n)] for names in (foreign, files)
    )
    if weights and not given:
        raise UsageError(f"{repository} holds weights ({weights[0]}). Give --weights again, or choose another name")


def _patiently(do: Callable[[], T]) -> T:
    """What ``do`` gives, tried again where the Hub asks to wait, is ill, or the connection breaks."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return do()
        except OfflineModeIsEnabled:
            raise
        except (OSError, *unreachable()) as exc:  # type: ignore[misc]  # mypy takes no tuple that is unpacked
            response = getattr(exc, "response", None)
            status = response.status_code if isinstance(exc, HfHubHTTPError) and response is not None else None
            if attempt == _ATTEMPTS or (status is not None and status != 429 and status < 500):
                raise
            wait = _asked(response) if status == 429 else 2.0 ** (attempt - 1)
            what = "asks to wait" if status == 429 else f"answers {status}" if status else "broke the connection"
            _say(f"the Hub {what}: again in {wait:.0f} s")
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _asked(response: Any) -> float:
    """Seconds of Retry-After, at most `_LONGEST_WAIT`."""
    said = str(response.headers.get("Retry-After", ""))
    return min(float(said), _LONGEST_WAIT) if said.isdecimal() else 10.0


@contextmanager
def _pushing(repository: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as exc:
        raise NetworkError("the Hub cannot be reached: HF_HUB_OFFLINE is set. Unset it, or use --dry-run") from exc
    except HfHubHTTPError as exc:
        raise _refused(repository, exc) from exc
    except ValueError as exc:
        raise HostError(f"the Hub does not take the card: {_without_token(str(exc))}") from exc
    except (OSError, *unreachable()) as exc:  # type: ignore[misc]  # mypy takes no tuple that is unpacked
        raise NetworkError(
            f"the connection to the Hub broke {_ATTEMPTS} times: {_without_token(str(exc)) or type(exc).__name__}. The "
            "same command completes what is missing"
        ) from exc


def _refused(repository: str, exc: Any) -> HostError | NetworkError:
    status = exc.response.status_code if exc.response is not None else 0
    words = _without_token(str(getattr(exc, "server_message", None) or ""))
    said = f" ({words})" if words else ""
    if status == 401:
        return HostError(f"the Hub does not take your token{said}. Run `hf auth login`, or set HF_TOKEN")
    if status == 403:
        return HostError(f"your token may not write to {repository}{said}. Use one with the right to write there")
    if status == 404:
        return HostError(f"there is no repository {repository} that your token may see{said}")
    if status in (409, 412):
        return HostError(f"{repository} was changed by someone else meanwhile{said}. Run the same command again")
    if status == 429:
        return NetworkError(f"the Hub keeps asking to wait{said}. Run the same command later")
    if status >= 500:
        return NetworkError(f"the Hub answers {status} again and again{said}. Run the same command later")
    return HostError(f"the Hub refuses to write {repository}: {status}{said}")


def _without_token(text: str) -> str:
    """``text`` in one line, and of any token nothing."""
    for token in tokens():
        text = text.replace(token, "***")
    return re.sub(r"hf_\w+", "***", " ".join(text.split()))[:300]


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
