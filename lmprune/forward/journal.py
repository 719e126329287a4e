"""The file beside the output from which an interrupted run goes on. Pure: numpy.

One line of JSON that says whose values follow, then rows of float64. Rows are only ever appended, so whatever moment
the process is killed at, the whole rows before it are true, and a broken last one is cut off.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmprune.errors import OutputError


class Journal:
    """Rows of ``width`` values of the run that ``identity`` describes; kept in memory alone without a ``path``."""

    def __init__(self, path: Path | None, identity: Mapping[str, Any], width: int, *, resume: bool = True) -> None:
        self._path = path
        self._header = (json.dumps(identity, sort_keys=True) + "\n").encode()
        self._blocks: list[NDArray[np.float64]] = []
        self._width = width
        self.stale = False
        """Whether a journal of another run was in the way and is overwritten."""
        if path is None:
            return
        try:
            self._open(path, resume)
        except OSError as exc:
            raise OutputError(f"cannot write {path}: {exc.strerror or exc}. Choose another path with -o") from exc

    def _open(self, path: Path, resume: bool) -> None:
        content = path.read_bytes() if path.is_file() and resume else b""
        size = 8 * self._width
        if content.startswith(self._header):
            whole = (len(content) - len(self._header)) // size * size
            self._blocks = [np.frombuffer(content, "<f8", whole // 8, len(self._header)).reshape(-1, self._width)]
        else:
            self.stale = bool(content)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._header)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(map(len, self._blocks))

    @property
    def values(self) -> NDArray[np.float64]:
        """All rows, of shape (rows, width)."""
        self._blocks = [np.concatenate(self._blocks)] if self._blocks else [np.empty((0, self._width))]
        return self._blocks[0]

    def cut(self, rows: int) -> None:
        """Keep only the first ``rows`` rows."""
        self._blocks = [self.values[:rows]]
        if self._path is not None:
            with self._path.open("r+b") as file:
                file.truncate(len(self._header) + 8 * self._width * rows)

    def append(self, values: NDArray[np.float64]) -> None:
        """Add rows and hand them to the operating system, where a kill cannot reach them."""
        self._blocks.append(values)
        if self._path is None:
            return
        try:
            with self._path.open("ab") as file:
                file.write(values.astype("<f8").tobytes())
        except OSError as exc:
            raise OutputError(f"cannot write {self._path}: {exc.strerror or exc}") from exc

    def remove(self) -> None:
        """Delete the file: the result is written."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
