"""Weights that wait in files: the system holds in memory what is used of them, and lets go of the rest.

A tensor in a mapped file is used as any other, changed in place too. Its pages belong to the file, so a pass needs no
more memory than the layer that it is at, however large the model. Views of such a model have their own weights there.
"""

from __future__ import annotations

import atexit
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from lmprune.errors import OutputError, sized
from lmprune.files import check_room

if TYPE_CHECKING:
    from torch import Tensor, nn

_LEAST = 1 << 16
"""Bytes from which a tensor gets a file."""
_MARK = "_lmprune_files"


class Files:
    """Where tensors wait.

    Args:
        folder: on a disk. Files have no name there once they are mapped, so that none is left however the process
            ends; on Windows, which does not know that, one may be.

    Raises:
        OutputError: it lies in memory.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if _in_memory(folder):
            raise OutputError(
                f"{folder} lies in memory itself, so that weights which wait there take it all the same. Write to a "
                "disk, or give --no-stream"
            )
        self._folder = folder

    def __deepcopy__(self, memo: dict[int, Any]) -> Files:
        return self

    def copy_of(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` that waits in a file, if it is large.

        Raises:
            OutputError: the disk has no room for it, or the system does not map it.
        """
        import torch

        if tensor.nbytes < _LEAST:
            return tensor.clone()
        check_room(self._folder / "weights", tensor.nbytes, "what waits in a file of weights")
        try:
            handle, path = tempfile.mkstemp(prefix=".weights-", dir=self._folder)
            try:
                if hasattr(os, "posix_fallocate"):  # or a full disk would end the process where it first writes
                    os.posix_fallocate(handle, 0, tensor.nbytes)
                found = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
            finally:
                os.close(handle)
                _remove(path)
        except (OSError, RuntimeError) as exc:  # torch says what the system does in words of its own
            why = exc.strerror if isinstance(exc, OSError) else str(exc).rpartition("bytes from file")[2] or str(exc)
            raise OutputError(
                f"{sized(tensor.nbytes)} of weights cannot wait in a file of {self._folder}: {why}. Write to another "
                "disk, or raise the limits of this shell (`ulimit -v`)"
            ) from exc
        return found.copy_(tensor)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except PermissionError:  # Windows, while it is mapped
        atexit.register(_try_to_remove, path)


def _try_to_remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


def _in_memory(folder: Path) -> bool:
    """Whether a folder lies on a file system that is memory itself."""
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    around = next((each for each in (folder.resolve(), *folder.resolve().parents) if each in mounts), None)
    return around is not None and mounts[around] in ("tmpfs", "ramfs")


def keep_in_files(module: nn.Module, files: Files) -> None:
    """Have the parameters of ``module`` that do not yet wait in ``files``; what shares one goes on to share it."""
    from torch import nn

    made: dict[int, nn.Parameter] = {}
    for each in module.modules():
        for name, held in each._parameters.items():
            if held is not None and held.untyped_storage().filename is None:
                if id(held) not in made:
                    made[id(held)] = nn.Parameter(files.copy_of(held.detach()), held.requires_grad)
                each._parameters[name] = made[id(held)]


def mark(model: Any, files: Files) -> None:
    """Have what is made of ``model``'s weights, as for its views, wait in ``files`` too."""
    setattr(model, _MARK, files)


def copied(model: Any, tensor: Tensor) -> Tensor:
    """A copy of ``tensor``, which is ``model``'s or to be: in a file where its weights wait in files."""
    files = getattr(model, _MARK, None)
    return files.copy_of(tensor) if files is not None else tensor.clone()


def placed(model: Any, tensor: Tensor) -> Tensor:
    """A new ``tensor`` of ``model``: in a file where its weights wait in files, else itself."""
    files = getattr(model, _MARK, None)
    return files.copy_of(tensor) if files is not None else tensor
