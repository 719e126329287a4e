"""What a folder of safetensors holds: names, types, shapes and places. Reads headers only and needs no torch.

A header is 8 bytes of little-endian length and that many bytes of JSON (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lmprune.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SAMPLE = 4096
_NOT_THE_DECODER = re.compile(r"(^|\.)(vision\w*|visual|audio\w*|image\w*|speech\w*|encoder|experts|mtp)(\.|$)")


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: bytes ``start`` to ``stop`` of ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file.

    Raises:
        ModelError: the file is missing, truncated or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            raw_length = file.read(8)
            length = struct.unpack("<Q", raw_length)[0] if len(raw_length) == 8 else -1
            if not 0 < length <= size - 8:
                raise ModelError(f"{path} is corrupt or truncated: its header does not fit. Download it again")
            header = json.loads(file.read(length))
        base = 8 + length
        entries = {
            name: TensorEntry(path, item["dtype"], tuple(item["shape"]), *(base + at for at in item["data_offsets"]))
            for name, item in header.items()
            if name != "__metadata__"
        }
    except OSError as exc:
        raise ModelError(f"cannot read {path}: {exc.strerror or exc}") from exc
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ModelError(f"{path} is corrupt: its safetensors header cannot be read. Download it again") from exc
    end = max((entry.stop for entry in entries.values()), default=base)
    if end != size:
        raise ModelError(
            f"{path} is corrupt or truncated: {size} bytes where its header promises {end}. Download it again"
        )
    return entries


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model folder, single-file or sharded, by name."""

    folder: Path
    tensors: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the headers of all shards.

        Raises:
            ModelError: there are no safetensors, a shard is missing, or the index and the shards disagree.
        """
        index = folder / INDEX
        if not index.is_file():
            files = [folder / SINGLE] if (folder / SINGLE).is_file() else []
            if not files:
                pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))
                if any(folder.glob("pytorch_model*.bin")):
                    found = f"only {pickles[0].name}, a pickle. To convert its tensors, add --allow-pickle"
                elif pickles:
                    found = f"only {pickles[0].name}, a pickle. Convert the model to safetensors first"
                else:
                    found = "no weights. Pickles of the Hub are fetched only with --allow-pickle"
                raise ModelError(f"{folder} holds no model.safetensors: {found}")
            return cls(folder, read_header(files[0]))
        try:
            wanted: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise ModelError(f"{index} cannot be read: {exc}. Download it again") from exc
        tensors: dict[str, TensorEntry] = {}
        for shard in sorted(set(wanted.values())):
            if Path(shard).name != shard:
                raise ModelError(f"{index} names the shard {shard!r}, which is not a plain file name")
            if not (folder / shard).is_file():
                raise ModelError(f"{folder} lacks the shard {shard}, which its index names. Download it again")
            tensors |= read_header(folder / shard)
        missing = sorted(set(wanted) - set(tensors))
        if missing:
            raise ModelError(f"{index} names {missing[0]!r}, which no shard holds ({len(missing)} such tensors)")
        return cls(folder, tensors)

    @classmethod
    def of_files(cls, folder: Path, files: Iterable[Path]) -> Checkpoint:
        """The tensors of the named files; errors as `read_header`."""
        tensors: dict[str, TensorEntry] = {}
        for file in files:
            tensors |= read_header(file)
        return cls(folder, tensors)

    @property
    def files(self) -> list[Path]:
        """The safetensors files that hold the tensors, and the index if there is one."""
        shards = sorted({entry.file for entry in self.tensors.values()})
        index = self.folder / INDEX
        return [*shards, index] if index.is_file() else shards

    @property
    def bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(entry.stop - entry.start for entry in self.tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every tensor's name, type, shape and first 4 KiB: cheap, and another for every fine-tune."""
        digest = hashlib.sha256()
        handles = {file: file.open("rb") for file in sorted({e.file for e in self.tensors.values()})}
        try:
            for name in sorted(self.tensors):
                entry = self.tensors[name]
                digest.update(f"{name}|{entry.dtype}|{entry.shape}|".encode())
                handle = handles[entry.file]
                handle.seek(entry.start)
                digest.update(handle.read(min(_SAMPLE, entry.stop - entry.start)))
        finally:
            for handle in handles.values():
                handle.close()
        return "sha256-4k:" + digest.hexdigest()[:32]


def decoders(paths: Iterable[str]) -> list[str]:
    """Those of several module paths that lie in a decoder, sorted; of one path alone there is no doubt."""
    paths = sorted(paths)
    return paths if len(paths) == 1 else [path for path in paths if not _NOT_THE_DECODER.search(path)]


def layer_prefix(names: Iterable[str], layers: int) -> str:
    """The module path under which the decoder's layers are numbered, such as ``model.layers``.

    Raises:
        ModelError: no path is numbered 0 to ``layers``-1, or several are.
    """
    seen: dict[str, set[int]] = {}
    for name in names:
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                seen.setdefault(".".join(parts[:i]), set()).add(int(part))
                break
    fitting = decoders(prefix for prefix, found in seen.items() if found >= set(range(layers)))
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(f"{prefix} ({len(numbers)})" for prefix, numbers in sorted(seen.items())) or "none"
    problem = "several lists of tensors are" if fitting else "no list of tensors is"
    raise ModelError(f"the config promises {layers} layers, but {problem} numbered 0 to {layers - 1}. Found: {found}")


def renamed(names: Iterable[str], prefix: str, kept: tuple[int, ...], layers: int) -> dict[str, str]:
    """Old name -> new name for every tensor that a pruned checkpoint holds; tensors of dropped layers are absent."""
    place = {old: new for new, old in enumerate(kept)}
    result: dict[str, str] = {}
    for name in names:
        if not name.startswith(prefix + "."):
            result[name] = name
            continue
        number, _, rest = name[len(prefix) + 1 :].partition(".")
        if not number.isdigit():
            result[name] = name
        elif int(number) in place:
            result[name] = f"{prefix}.{place[int(number)]}.{rest}"
    return result


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as a plain dictionary.

    Raises:
        ModelError: the file is missing or not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise ModelError(f"{folder} holds no config.json, so it is not a model folder") from exc
    except (OSError, ValueError) as exc:
        raise ModelError(f"cannot read {path}: {exc}") from exc
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object")
    return config


def stored_dtype(config: Mapping[str, Any]) -> str | None:
    """The type that a config.json names, under its new or its old key."""
    text = config.get("text_config") or {}
    found = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    return found if isinstance(found, str) else None
