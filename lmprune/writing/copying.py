"""Our own writer: byte ranges of kept tensors go from file to file under new names. Needs no torch and little memory.

It is used where mergekit cannot be right (see `lmprune.writing.support`): it never looks into a tensor, so it cannot
lose or change one, whatever the architecture. Each shard of the source becomes one shard of the result.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lmprune.cuts.plan import Plan
from lmprune.errors import ModelError, OutputError
from lmprune.files import write_json
from lmprune.models.carrying import Change, cut_fields, cut_names, tensor_changes
from lmprune.models.checkpoint import INDEX, SINGLE, Checkpoint, TensorEntry, read_config
from lmprune.models.companions import copy_companions
from lmprune.models.cut import Cut
from lmprune.models.dtypes import stored_type
from lmprune.models.fields import apply_fields

_CHUNK = 1 << 23


def copy_checkpoint(cut: Cut, out: Path) -> None:
    """Write what ``cut`` leaves of its base to ``out``: tensors, repaired config, companions.

    Raises:
        ModelError: the source is unreadable, contradicts its config, or no config can describe the pruned model.
        OutputError: ``out`` cannot be written.
    """
    folder, plan = cut.base.path, cut.plan or Plan(cut.layers)
    config = apply_fields(read_config(folder), cut_fields(cut.whole_config.to_dict(), plan))
    names = cut_names(cut.checkpoint.tensors, plan)
    try:
        out.mkdir(parents=True, exist_ok=True)
        copy_tensors(
            cut.checkpoint, names, out, tensor_changes(cut.checkpoint.tensors, plan, cut.whole_config.to_dict())
        )
        write_json(out / "config.json", config)
        copy_companions(folder, out, code=cut.trust_remote_code)
    except OSError as exc:
        raise OutputError(f"cannot write {out}: {exc.strerror or exc}. Choose another folder") from exc


def copy_tensors(
    source: Checkpoint, names: Mapping[str, str], out: Path, changes: Mapping[str, Change] | None = None
) -> None:
    """Copy the tensors of ``names``, old -> new, to safetensors files in ``out``; several get an index.

    ``changes`` names, by old name, those that are not copied byte for byte, and what becomes of them.
    """
    changes = changes or {}
    shards: dict[Path, list[str]] = {}
    for old in names:
        shards.setdefault(source.tensors[old].file, []).append(old)
    files = sorted(shards)
    targets = [SINGLE] if len(files) == 1 else [f"model-{i:05d}-of-{len(files):05d}.safetensors"
                                                for i in range(1, len(files) + 1)]  # fmt: skip
    for file, target in zip(files, targets):
        places = sorted(shards[file], key=lambda old: source.tensors[old].start)
        write_shard([(names[old], source.tensors[old], changes.get(old)) for old in places], out / target)
    if len(files) > 1:
        weight_map = {names[old]: target for file, target in zip(files, targets) for old in shards[file]}
        total = Checkpoint.of_files(out, [out / target for target in targets]).bytes
        write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def write_shard(tensors: Sequence[tuple[str, TensorEntry, Change | None]], target: Path) -> None:
    """One safetensors file of tensors that lie, in this order, in one source file."""
    shapes = {name: _shape_after(entry, change) for name, entry, change in tensors if change is not None}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, entry, _ in tensors:
        shape, size = list(entry.shape), entry.stop - entry.start
        if name in shapes:
            # In the type that it had, so that bytes follow numbers.
            size = size // max(1, math.prod(shape)) * math.prod(shapes[name])
            shape = shapes[name]
        header[name] = {"dtype": entry.dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the first tensor to 8 bytes
    with tensors[0][1].file.open("rb") as source, target.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.flush()
        for are_changed, group in groupby(tensors, key=lambda item: item[0] in shapes):
            if are_changed:
                for _, entry, change in group:
                    assert change is not None
                    file.write(_changed(entry, change))
                file.flush()
            else:
                for start, stop in _ranges(entry for _, entry, _ in group):
                    _copy_range(source.fileno(), start, stop, file.fileno())


def _shape_after(entry: TensorEntry, change: Change) -> list[int]:
    """The shape of a tensor after ``change``, which is found out without its numbers."""
    import torch

    return list(change(torch.empty(entry.shape, dtype=stored_type(entry.dtype), device="meta")).shape)


def _changed(entry: TensorEntry, change: Change) -> bytes:
    """The bytes of a tensor after ``change``, in the type that it had."""
    from lmprune.models.tensors import read_tensor, tensor_bytes

    before = read_tensor(entry)
    return tensor_bytes(change(before).to(before.dtype))


def _ranges(entries: Iterable[TensorEntry]) -> list[tuple[int, int]]:
    """Byte ranges, neighbours joined."""
    found: list[tuple[int, int]] = []
    for entry in entries:
        if found and found[-1][1] == entry.start:
            found[-1] = (found[-1][0], entry.stop)
        else:
            found.append((entry.start, entry.stop))
    return found


def _copy_range(source: int, start: int, stop: int, target: int) -> None:
    """Append bytes ``start`` to ``stop`` of one file descriptor to another, within the kernel where it can."""
    while start < stop:
        try:
            done = os.sendfile(target, source, start, stop - start)
        except (AttributeError, OSError):
            done = _copy_chunk(source, start, min(stop - start, _CHUNK), target)
        if not done:
            raise ModelError(
                "the source checkpoint became shorter while it was being read. Is another program writing it?"
            )
        start += done


def _copy_chunk(source: int, start: int, size: int, target: int) -> int:
    block = os.pread(source, size, start)
    view = memoryview(block)
    while view:
        view = view[os.write(target, view) :]
    return len(block)
