"""Writing results whole or not at all, and reading JSON and YAML strictly. Pure: standard library and PyYAML."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmprune.errors import OutputError


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` under a temporary name, then rename, so that ``path`` is always whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as exc:
        raise OutputError(f"cannot write {path}: {exc.strerror or exc}. Choose another path with -o") from exc


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of ``text`` in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, data: Any) -> None:
    """`write_text` of ``data`` as indented JSON with one trailing newline."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_output_file(path: Path) -> None:
    """Refuse a path that cannot become a file, before any work is done."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder. Give the name of a file")
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write {path}: {folder} is not a folder that you may write to")


def check_output_folder(path: Path) -> None:
    """Refuse a folder that exists and holds something, or that cannot be made, before any work is done."""
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file. Give the name of a new folder")
    if path.is_dir() and any(path.iterdir()):
        raise OutputError(f"{path} exists and is not empty. Choose another folder or remove it")
    check_output_file(path / "x")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that becomes ``path`` when the block ends well, and vanishes otherwise."""
    check_output_folder(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        os.chmod(temporary, 0o777 & ~_umask())
    except OSError as exc:
        raise OutputError(f"cannot write {path}: {exc.strerror or exc}. Choose another folder") from exc
    try:
        yield temporary
        if path.is_dir():
            path.rmdir()
        os.replace(temporary, path)
    except OSError as exc:
        raise OutputError(f"cannot write {path}: {exc.strerror or exc}. Choose another folder") from exc
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
