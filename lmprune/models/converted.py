"""Weights that are no safetensors yet, made into safetensors once and kept in a cache."""

from __future__ import annotations

import hashlib
import pickle
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from lmprune.cache import cache_root
from lmprune.errors import ModelError
from lmprune.files import locked, new_folder, sweep_halves, write_json
from lmprune.models.checkpoint import INDEX, SINGLE, read_index
from lmprune.models.companions import check_companions, companions, copy_companions

PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"


def cached_folder(sources: Iterable[Path], write: Callable[[Path], None]) -> Path:
    """The folder that ``write`` makes of the files ``sources``: from the cache while none of them has changed."""
    digest = hashlib.sha256()
    for file in sorted(sources):
        about = file.stat()
        digest.update(f"{file.resolve()}|{about.st_size}|{about.st_mtime_ns}\n".encode())
    folder = cache_root() / digest.hexdigest()[:32]
    if not folder.is_dir():
        with locked(folder, wait=True):  # another process may want the same
            if not folder.is_dir():
                sweep_halves(cache_root())  # of other conversions too, which nobody may ask for again
                with new_folder(folder, lock=False) as new:
                    write(new)
    return folder


def has_only_pickles(folder: Path) -> bool:
    """Whether the weights in ``folder`` are pickles of torch and nothing else."""
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        return False
    return (folder / PICKLE).is_file() or (folder / PICKLE_INDEX).is_file()


def from_pickles(folder: Path) -> Path:
    """A copy of the model in ``folder`` with its pickled tensors as safetensors; nothing but tensors is unpickled.

    Raises:
        ModelError: a file is missing or corrupt, or holds something else than tensors.
    """
    files = _pickle_files(folder)
    check_companions(folder, code=True)

    def write(out: Path) -> None:
        places: dict[str, str] = {}
        for i, file in enumerate(files, 1):
            target = SINGLE if len(files) == 1 else f"model-{i:05d}-of-{len(files):05d}.safetensors"
            places |= dict.fromkeys(_convert(file, out / target), target)
        if len(files) > 1:
            write_json(out / INDEX, {"metadata": {}, "weight_map": dict(sorted(places.items()))})
        shutil.copyfile(folder / "config.json", out / "config.json")
        copy_companions(folder, out, code=True)  # nothing runs it here

    return cached_folder([*files, folder / "config.json", *companions(folder, code=True)], write)


def _pickle_files(folder: Path) -> list[Path]:
    index = folder / PICKLE_INDEX
    if not index.is_file():
        return [folder / PICKLE]
    names = sorted(set(read_index(index).values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelError(f"{folder} lacks the shard {name}, which its index names. Download it again")
    return [folder / name for name in names]


def _convert(file: Path, target: Path) -> list[str]:
    """Write the tensors of one pickle as safetensors; returns their names."""
    import torch
    from safetensors.torch import save_file

    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as exc:
        raise ModelError(
            f"{file} is corrupt or holds more than tensors, and loading it could run code. "
            "Convert the model to safetensors where you trust it"
        ) from exc
    if not isinstance(loaded, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
        raise ModelError(f"{file} is no dictionary of tensors, so it is no model's weights")
    # Clones, since tied tensors share memory, which safetensors refuses.
    save_file({name: tensor.contiguous().clone() for name, tensor in loaded.items()}, target, {"format": "pt"})
    return list(loaded)
