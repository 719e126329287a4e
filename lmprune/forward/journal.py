"""The file beside the output from which an interrupted run goes on, and whether it is the same run. Pure: numpy."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from filelock import FileLock

from lmprune.errors import OutputError
from lmprune.files import free_lock, take_lock

Key = str | int


def changed(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The names of what differs between two identities, sorted; a key that one lacks counts as None there.

    Both are compared as JSON holds them, so that a tuple equals the list that was read back.

    >>> changed({"seed": 0, "layers": (1, 2)}, {"seed": 1, "layers": [1, 2]})
    ['seed']
    """
    return sorted(key for key in {*mine, *theirs} if _plain(mine.get(key)) != _plain(theirs.get(key)))


class Journal:
    """Records by key of the run that ``identity`` describes.

    The file is JSON, line by line: the identity, then one record a line, ``{"key": ..., "value": ...}``. Lines are only
    ever appended, so whatever moment the process is killed at, the whole lines before it are true; a broken last one is
    cut off when the file is opened again. Of two records of one key the later counts. Values are plain data and numpy
    arrays, which come back bit for bit.

    A file with another identity is another run's: it is overwritten, and `stale` says so. As long as a journal is open
    its file is locked, so that two runs on one output never mix their records; a kill frees the lock. Of several
    processes only the main one opens the file; the others keep a journal without a path.

    Args:
        path: the file; None keeps the records in memory alone.
        identity: all that the records depend on, as plain data.
        resume: whether records of an earlier run with this identity are taken.

    Attributes:
        stale: a journal of another run was in the way and is overwritten.

    Raises:
        OutputError: the file cannot be written, or another process has it open.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any], *, resume: bool = True) -> None:
        self._path = path
        self._found: dict[Key, Any] = {}
        self._lock: FileLock | None = None
        self._is_open = False
        self.stale = False
        if path is None:
            return
        try:
            self._lock, self._is_open = take_lock(path), True
            self._open(path, json.dumps(identity, sort_keys=True, default=_packed), resume)
        except OSError as exc:
            self.close()
            raise OutputError(f"cannot write {path}: {exc.strerror or exc}. Choose another place") from exc

    def _open(self, path: Path, header: str, resume: bool) -> None:
        content = path.read_bytes() if path.is_file() and resume else b""
        first, _, rest = content.partition(b"\n")
        if first.decode(errors="replace") != header:
            self.stale = bool(content)
            path.write_bytes(f"{header}\n".encode())
            return
        good = len(first) + 1
        for line in rest.splitlines(keepends=True):
            record = _record(line)
            if record is None:
                break
            self._found[record[0]] = record[1]
            good += len(line)
        if good < len(content):
            with path.open("r+b") as file:
                file.truncate(good)

    # --- records ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._found)

    def has(self, key: Key) -> bool:
        """Whether there is a record of ``key``."""
        return key in self._found

    def get(self, key: Key) -> Any:
        """The record of ``key``; `KeyError` where there is none."""
        return self._found[key]

    def put(self, key: Key, value: Any) -> None:
        """Note a record, and hand it to the operating system, where a kill cannot reach it."""
        self._found[key] = value
        if self._path is None:
            return
        assert self._is_open, "the journal is closed"
        try:
            with self._path.open("ab") as file:
                file.write((json.dumps({"key": key, "value": value}, default=_packed) + "\n").encode())
        except OSError as exc:
            raise OutputError(f"cannot write {self._path}: {exc.strerror or exc}") from exc

    # --- its end ------------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Delete the file, since the result is written, and close."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let others have the file."""
        lock, self._lock, self._is_open = self._lock, None, False
        free_lock(lock)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _record(line: bytes) -> tuple[Key, Any] | None:
    """Key and value of a whole line; None of a broken one."""
    if not line.endswith(b"\n"):
        return None
    try:
        data = json.loads(line, object_hook=_unpacked)
        return data["key"], data["value"]
    except (ValueError, KeyError, TypeError, SyntaxError, RecursionError):  # of numpy's types, SyntaxError
        return None


def _packed(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        little = value.astype(value.dtype.newbyteorder("<"))
        text = base64.b64encode(little.tobytes()).decode("ascii")
        return {"array": text, "dtype": little.dtype.str, "shape": list(value.shape)}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a journal holds plain data and arrays, not {type(value).__name__}")


def _unpacked(data: dict[str, Any]) -> Any:
    if data.keys() != {"array", "dtype", "shape"}:
        return data
    raw = base64.b64decode(data["array"], validate=True)
    array = np.frombuffer(raw, dtype=np.dtype(data["dtype"])).reshape(data["shape"])
    return array.astype(array.dtype.newbyteorder("="))


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str, sort_keys=True))
