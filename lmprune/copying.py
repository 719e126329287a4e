"""Our own writer: byte ranges of kept tensors go from file to file under new names. Needs no torch and little memory.

It is used where mergekit cannot be right (see `lmprune.support`): it never looks into a tensor, so it cannot lose or
change one, whatever the architecture. Each shard of the source becomes one shard of the result.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmprune.errors import ModelError, OutputError
from lmprune.files import write_json
from lmprune.models.checkpoint import INDEX, SINGLE, Checkpoint, TensorEntry, layer_prefix, read_config, renamed
from lmprune.models.fields import apply_fields, changed_fields
from lmprune.plan import LayerPlan

COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "additional_chat_templates/*.jinja")
"""Tokenizer, chat templates, generation config, processors."""
LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
CODE = ("*.py",)
_NOT_COMPANIONS = ("config.json", "*.index.json", "adapter_config.json", "lmprune.json", "mergekit_config.yml")
_CHUNK = 1 << 23


def copy_checkpoint(folder: Path, plan: LayerPlan, out: Path, *, trust_remote_code: bool = False) -> None:
    """Write the model in ``folder`` without the dropped layers to ``out``: tensors, repaired config, companions.

    Raises:
        ModelError: the source is unreadable, contradicts its config, or no config can describe the pruned model.
        OutputError: ``out`` cannot be written.
    """
    from lmprune.models.loading import load_config

    source = Checkpoint.open(folder)
    resolved = load_config(folder, trust_remote_code=trust_remote_code).to_dict()
    config = apply_fields(read_config(folder), changed_fields(resolved, plan.kept))
    names = renamed(source.tensors, layer_prefix(source.tensors, plan.layers), plan.kept, plan.layers)
    try:
        out.mkdir(parents=True, exist_ok=True)
        copy_tensors(source, names, out)
        write_json(out / "config.json", config)
        copy_companions(folder, out, code=trust_remote_code)
    except OSError as exc:
        raise OutputError(f"cannot write {out}: {exc.strerror or exc}. Choose another folder") from exc


def copy_tensors(source: Checkpoint, names: Mapping[str, str], out: Path) -> None:
    """Copy the tensors of ``names``, old -> new, to safetensors files in ``out``; several get an index."""
    shards: dict[Path, list[str]] = {}
    for old in names:
        shards.setdefault(source.tensors[old].file, []).append(old)
    files = sorted(shards)
    targets = [SINGLE] if len(files) == 1 else [f"model-{i:05d}-of-{len(files):05d}.safetensors"
                                                for i in range(1, len(files) + 1)]  # fmt: skip
    for file, target in zip(files, targets):
        tensors = sorted(((names[old], source.tensors[old]) for old in shards[file]), key=lambda item: item[1].start)
        write_shard(tensors, out / target)
    if len(files) > 1:
        weight_map = {names[old]: target for file, target in zip(files, targets) for old in shards[file]}
        total = sum(source.tensors[old].stop - source.tensors[old].start for old in names)
        write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def write_shard(tensors: Sequence[tuple[str, TensorEntry]], target: Path) -> None:
    """One safetensors file of tensors that lie, in this order, in one source file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, entry in tensors:
        size = entry.stop - entry.start
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the first tensor to 8 bytes
    with tensors[0][1].file.open("rb") as source, target.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.flush()
        for start, stop in _ranges(entry for _, entry in tensors):
            _copy_range(source.fileno(), start, stop, file.fileno())


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


def copy_companions(folder: Path, out: Path, *, code: bool = False) -> list[str]:
    """Copy what belongs to a model besides weights and config; Python files only where ``code`` is trusted.

    Returns:
        The names copied, sorted.
    """
    names = set()
    for pattern in (*COMPANIONS, *LEGAL, *(CODE if code else ())):
        for file in folder.glob(pattern):
            if file.is_file() and not any(file.match(other) for other in _NOT_COMPANIONS):
                name = file.relative_to(folder)
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, out / name)
                names.add(str(name))
    return sorted(names)
