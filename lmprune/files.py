"""Writing results whole or not at all, under locks, and reading JSON and YAML strictly. Pure: PyYAML and filelock."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from glob import escape
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from lmprune.errors import LmpruneError, OutputError, UsageError, shown, sized

LOGGER = logging.getLogger("lmprune")
LONGEST_NAME = 250
"""Letters of a file's name; most systems take a few more."""
LARGEST = 1 << 28
"""Bytes of the largest file of JSON that is read: a profile of 200 layers takes a tenth of it."""


def as_path(name: str | Path) -> Path:
    """The path that a user, or a file, calls ``name``; a ``~`` at its head is a home where there is such a one.

    Raises:
        UsageError: no file can have that name.
    """
    path = Path(name)
    if any(len(part) > LONGEST_NAME for part in path.parts) or len(str(path)) > 16 * LONGEST_NAME:
        raise UsageError(f"{shown(str(name))} is longer than the name of a file can be")
    try:
        str(path).encode()
    except UnicodeEncodeError as exc:
        raise UsageError(f"{shown(str(name))} is no name in UTF-8, which recipes and weights need. Rename it") from exc
    with suppress(RuntimeError):
        path = path.expanduser()
    return path


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` under a temporary name, then rename, so that ``path`` is always whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=_half(path), dir=path.parent)
        _sweep_old(path)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as exc:
        raise OutputError(f"cannot write {path}: {exc.strerror or exc}. Choose another place") from exc


def _sweep_old(path: Path) -> None:
    """Remove what runs that were killed left of ``path``, which takes a moment to write, more than an hour ago."""
    for left in path.parent.glob(f"{escape(_half(path))}*"):
        with suppress(OSError):
            if left.is_file() and left.stat().st_mtime < time.time() - 3600:
                left.unlink()


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of ``text`` in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, data: Any) -> None:
    """`write_text` of ``data`` as indented JSON with one trailing newline."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_text(path: Path, error: type[LmpruneError], remedy: str, *, limit: int = LARGEST) -> str:
    """The text of a regular file.

    Raises:
        FileNotFoundError: there is none; only the caller knows what to do then.
        error: it cannot be read, or is larger than ``limit`` bytes; ``remedy`` says what to do.
    """
    try:
        if path.exists() and not path.is_file():
            raise error(f"{path} is no file. {remedy}")
        if path.stat().st_size > limit:
            raise error(f"{path} is larger than {limit >> 20} MiB. {remedy}")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as exc:
        raise error(f"cannot read {path}: {getattr(exc, 'strerror', None) or exc}. {remedy}") from exc


def read_json(path: Path, error: type[LmpruneError], remedy: str, *, limit: int = LARGEST) -> Any:
    """What a file of JSON says; errors as `read_text`."""
    text = read_text(path, error, remedy, limit=limit)
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as exc:
        raise error(f"{path} is not JSON: {str(exc)[:120]}. {remedy}") from exc


def parse_json(text: str | bytes) -> Any:
    """What ``text`` says, without halves of characters, which no file or terminal takes.

    Raises:
        ValueError, RecursionError: it is no such thing.
    """
    data = json.loads(text)
    if (b"\\ud" in text.lower()) if isinstance(text, bytes) else ("\\ud" in text.lower()):
        json.dumps(data, ensure_ascii=False).encode()
    return data


def read_yaml(path: Path, error: type[LmpruneError], remedy: str, *, limit: int) -> Any:
    """What a file of YAML says that nobody needs to trust: no aliases, no key twice, nothing that is not plain data.

    Raises:
        As `read_text`.
    """
    text = read_text(path, error, remedy, limit=limit)
    try:
        data = yaml.load(text, _PlainLoader)
        json.dumps(data, ensure_ascii=False).encode("utf-8")  # dates, bytes, halves of a character
    except yaml.YAMLError as exc:
        raise error(f"{path} is not YAML: {' '.join(str(exc).split())[:300]}. {remedy}") from exc
    except (ValueError, TypeError, RecursionError) as exc:
        raise error(f"{path} is no plain YAML: {str(exc)[:120]}. {remedy}") from exc
    return data


class _PlainLoader(yaml.SafeLoader):
    """Refuses what a few bytes can make large or ambiguous."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not read here", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)) or key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {str(key)[:40]!r} stands twice or is none", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def lies_in(file: Path, folder: Path) -> bool:
    """Whether ``file`` is no link out of ``folder``; in the Hub's cache, a snapshot's files are links to blobs beside.

    What comes from elsewhere must not choose which other files of ours are read or copied.
    """
    homes = [folder.resolve()]
    if folder.parent.name == "snapshots":
        homes.append((folder.parent.parent / "blobs").resolve())
    return any(file.resolve().is_relative_to(home) for home in homes)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_output_file(path: Path, suffixes: Sequence[str] = ()) -> None:
    """Refuse a path that cannot become a file, or that no command would know, or under which lies what no such result
    should replace, before any work is done.

    Args:
        suffixes: how the name must end, where commands know such files by that.
    """
    as_path(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder. Give the name of a file")
    if suffixes and path.suffix not in suffixes:
        raise UsageError(
            f"{path}: the name must end in {suffixes[0]}, by which other commands know what it is. Add that"
        )
    if path.is_file() and (path.name in _OTHERS or (path.suffix in _SOURCES and path.suffix not in suffixes)):
        raise OutputError(f"{path} is there already, and something else than what is to be written. Give another name")
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write {path}: {folder} is not a folder that you may write to")


_OTHERS = {
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.json", "model.safetensors.index.json", "adapter_config.json", "lmprune.json", "sweep.json"),
}
"""Files of models and of sweeps, which a slip of the hand would lose."""
_SOURCES = (".safetensors", ".gguf", ".yml", ".yaml", ".jsonl", ".parquet", ".py")


def check_output_folder(path: Path) -> None:
    """Refuse a folder that exists and holds something, or that cannot be made, before any work is done."""
    as_path(path)
    if path.is_symlink():  # in whose place nothing can be put
        raise OutputError(f"{path} is a link. Give the folder itself, or the name of a new one")
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file. Give the name of a new folder")
    if path.is_dir() and any(path.iterdir()):
        raise OutputError(f"{path} exists and is not empty. Choose another folder or remove it")
    check_output_file(path / "x")


def check_room(path: Path, size: int, what: str = "it") -> None:
    """Refuse, before any work is done, what will not fit.

    Args:
        size: bytes of the largest file that will be written to ``path``, or to its folder.
        what: a word for that.

    Raises:
        OutputError: the disk has no room for it, or no file may be so large.
    """
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OutputError(
            f"{what} needs {sized(size)}, and {sized(free)} are free where {path} is to be. Make room or "
            "choose another place"
        )
    most = _largest_file()
    if most is not None and size > most:
        raise OutputError(
            f"{what} needs a file of {sized(size)}, and this shell allows {sized(most)} (`ulimit -f`). Raise the limit"
        )


def _largest_file() -> int | None:
    """Bytes that a file of this process may have; None where there is no limit."""
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return None
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if soft == resource.RLIM_INFINITY else soft


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Within the block nobody else writes ``path``; a kill frees it. The lock is a hidden file beside it.

    Args:
        wait: for whoever has it, instead of refusing.

    Raises:
        OutputError: another process has it, or no lock can be made there.
    """
    lock = take_lock(path, wait=wait)
    try:
        yield
    finally:
        free_lock(lock)


def take_lock(path: Path, *, wait: bool = False) -> FileLock | None:
    """As `locked`, without a block; None, with a warning, where the file system knows no locks."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=wait)
    except Timeout as exc:
        if not Path(lock.lock_file).exists():  # nobody has it: it cannot be made
            raise OutputError(f"cannot write {path}: no file can be made there. Choose another place") from exc
        raise OutputError(f"another run is writing {path}. Wait for its end, or choose another path with -o") from exc
    except NotImplementedError:  # by filelock
        LOGGER.warning(f"the file system of {path} knows no locks: start nothing else there until this has ended")
        return None
    except OSError as exc:
        raise OutputError(f"cannot write {path}: {exc.strerror or exc}. Choose another place") from exc
    return lock


def free_lock(lock: FileLock | None) -> None:
    """Let others have what `take_lock` took."""
    if lock is None:
        return
    with suppress(OSError):  # Windows lets nobody remove what is open, and removes it at the release
        # While it is held: after the release it may be another's.
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


@contextmanager
def new_folder(path: Path, *, lock: bool = True) -> Iterator[Path]:
    """A temporary folder beside ``path`` that becomes ``path`` when the block ends well, and vanishes otherwise.

    What a killed run has left of such a folder is removed first. ``lock`` keeps others from writing the same path.

    Raises:
        OutputError: ``path`` cannot be written, is not empty, or is being written by another process.
    """
    check_output_folder(path)
    with locked(path) if lock else nullcontext():
        check_output_folder(path)  # whoever had the lock may have written it
        temporary = _half_folder(path)
        try:
            yield temporary
            if path.is_dir():
                path.rmdir()
            os.replace(temporary, path)
        except OSError as exc:
            raise OutputError(f"cannot write {path}: {exc.strerror or exc}. Choose another folder") from exc
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path``, under its lock, for what becomes ``path``; it vanishes when the block ends.

    What a killed run has left of such a folder is removed first.

    Raises:
        OutputError: none can be made there, or another process writes ``path``.
    """
    with locked(path):
        temporary = _half_folder(path)
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _half_folder(path: Path) -> Path:
    """Made by whoever holds the lock of ``path``, so that all other such folders were left by runs that are gone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"{escape(_half(path))}*"):
            shutil.rmtree(left, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=_half(path), dir=path.parent))
        os.chmod(temporary, 0o777 & ~_umask())
    except OSError as exc:
        raise OutputError(f"cannot write {path}: {exc.strerror or exc}. Choose another folder") from exc
    return temporary


def sweep_halves(folder: Path) -> None:
    """Remove the half-made folders in ``folder`` that no running process makes: whole models, after kills."""
    for left in folder.glob(f".*{_HALF}*"):
        path = left.with_name(left.name[1:].rpartition(_HALF)[0])
        try:
            lock = take_lock(path)
        except OutputError:  # it is being made
            continue
        shutil.rmtree(left, ignore_errors=True)
        free_lock(lock)


_HALF = ".half-"


def _half(path: Path) -> str:
    """How the names of what is not whole yet begin."""
    return f".{path.name}{_HALF}"
