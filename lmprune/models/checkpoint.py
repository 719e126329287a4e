"""What a folder of safetensors holds: names, types, shapes and places. Reads headers only and needs no torch.

A header is 8 bytes of little-endian length and that many bytes of JSON (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lmprune.errors import ModelError, shown
from lmprune.files import read_json

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
        ModelError: the file is missing, truncated or not safetensors, or its header contradicts itself or the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            raw_length = file.read(8)
            length = struct.unpack("<Q", raw_length)[0] if len(raw_length) == 8 else -1
            if not 0 < length <= min(size - 8, _LONGEST_HEADER):
                raise ModelError(f"{path} is corrupt or truncated: its header does not fit. Download it again")
            header = _parsed(file.read(length))
        base = 8 + length
        entries = {name: _entry(path, item, base) for name, item in header.items() if name != "__metadata__"}
    except OSError as exc:
        raise ModelError(f"cannot read {path}: {exc.strerror or exc}") from exc
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise ModelError(f"{path} is corrupt: its safetensors header cannot be read. Download it again") from exc
    at = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at:
            raise ModelError(
                f"{path} is corrupt: {shown(name)} begins at byte {entry.start - base} of the tensors and not at the "
                f"next, {at - base}. Download it again"
            )
        if (needed := _bytes_of(entry)) != entry.stop - entry.start:
            raise ModelError(
                f"{path} is corrupt: {shown(name)} of shape {shown(list(entry.shape))} and type {entry.dtype} has "
                f"{entry.stop - entry.start} bytes and not {needed}. Download it again"
            )
        at = entry.stop
    if at != size:
        raise ModelError(
            f"{path} is corrupt or truncated: {size} bytes where its header promises {at}. Download it again"
        )
    return entries


def _parsed(text: bytes) -> dict[str, Any]:
    """The header as the format has it: one object of JSON in UTF-8, no key twice, names that can be shown.

    Raises:
        ValueError, RecursionError: it is none.
    """
    if not text.startswith(b"{"):
        raise ValueError("a header begins with a brace")
    header: dict[str, Any] = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    about = header.get("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise ValueError("metadata are texts")
    if not all(name.isprintable() and name for name in header):
        raise ValueError("a tensor has no name")
    return header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _entry(path: Path, item: Mapping[str, Any], base: int) -> TensorEntry:
    shape, offsets = item["shape"], item["data_offsets"]
    if not isinstance(item["dtype"], str) or len(offsets) != 2:
        raise ValueError("a tensor has a type and two offsets")
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, *offsets)):
        raise ValueError("shapes and offsets are whole numbers")
    if item["dtype"] not in _BITS:
        raise ValueError("a type that the format does not know")
    if offsets[0] > offsets[1]:
        raise ValueError("a tensor ends before it begins")
    return TensorEntry(path, item["dtype"], tuple(shape), base + offsets[0], base + offsets[1])


def _bytes_of(entry: TensorEntry) -> float:
    """What its shape and type need; no whole number where that is not even one."""
    return math.prod(entry.shape) * _BITS[entry.dtype] / 8


_BITS = {
    "F4": 4, **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16), **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}  # fmt: skip
"""Of one number of each type that the format knows."""
_LONGEST_NAME = 200
"""Of a file; all systems take that many letters."""
_LONGEST_HEADER = 100_000_000
"""As in safetensors' own reader."""


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
            if not (found_tensors := read_header(files[0])):
                raise ModelError(f"{files[0]} holds no tensors. Download it again")
            return cls(folder, found_tensors)
        wanted = read_index(index)
        tensors: dict[str, TensorEntry] = {}
        for shard in sorted(set(wanted.values())):
            if Path(shard).name != shard:
                raise ModelError(f"{index} names the shard {shown(shard)}, which is not a plain file name")
            if len(shard) > _LONGEST_NAME or not (folder / shard).is_file():
                raise ModelError(f"{folder} lacks the shard {shown(shard)}, which its index names. Download it again")
            tensors |= read_header(folder / shard)
        if (folder / SINGLE).is_file() and SINGLE not in wanted.values():
            # transformers reads the one, mergekit the others.
            raise ModelError(
                f"{folder} holds {SINGLE} and {INDEX} with other files, which may be two models. Remove one of them"
            )
        missing = sorted(set(wanted) - set(tensors))
        if missing:
            raise ModelError(f"{index} names {shown(missing[0])}, which no shard holds ({len(missing)} such tensors)")
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


def read_index(path: Path) -> dict[str, str]:
    """Tensor -> file, as an index of shards says.

    Raises:
        ModelError: it cannot be read.
    """
    data = read_json(path, ModelError, "Download it again")
    found = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise ModelError(f"{path} has no mapping 'weight_map' from tensors to files. Download it again")
    return found


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
            if is_number(part):
                seen.setdefault(".".join(parts[:i]), set()).add(int(part))
                break
    fitting = decoders(prefix for prefix, found in seen.items() if found >= set(range(layers)))
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(f"{prefix} ({len(numbers)})" for prefix, numbers in sorted(seen.items())) or "none"
    problem = "several lists of tensors are" if fitting else "no list of tensors is"
    raise ModelError(f"the config promises {layers} layers, but {problem} numbered 0 to {layers - 1}. Found: {found}")


def is_number(part: str) -> bool:
    """Whether a part of a tensor's name is the number of a layer as everybody writes it.

    >>> is_number("10"), is_number("01"), is_number("\u0661"), is_number("x")
    (True, False, False, False)
    """
    return part.isascii() and part.isdecimal() and len(part) < 6 and (part == "0" or part[0] != "0")


def renamed(names: Iterable[str], prefix: str, kept: tuple[int, ...], layers: int) -> dict[str, str]:
    """Old name -> new name for every tensor that a pruned checkpoint holds; tensors of dropped layers are absent."""
    place = {old: new for new, old in enumerate(kept)}
    result: dict[str, str] = {}
    for name in names:
        if not name.startswith(prefix + "."):
            result[name] = name
            continue
        number, _, rest = name[len(prefix) + 1 :].partition(".")
        if not is_number(number):
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
        config = read_json(path, ModelError, "Download it again", limit=1 << 26)
    except FileNotFoundError as exc:
        raise ModelError(f"{folder} holds no config.json, so it is not a model folder") from exc
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object")
    return config


def stored_dtype(config: Mapping[str, Any]) -> str | None:
    """The type that a config.json names, under its new or its old key."""
    text = config.get("text_config")
    text = text if isinstance(text, dict) else {}
    found = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    return found if isinstance(found, str) else None
