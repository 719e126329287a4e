"""A repair of a model larger than memory: read, measured and written one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lmprune.cuts.plan import Plan
from lmprune.errors import UsageError
from lmprune.files import check_room, write_json
from lmprune.forward.batches import Batch
from lmprune.forward.loss import Losses, block_sums, of_sums, targets
from lmprune.forward.machine import fits, weights_bytes
from lmprune.forward.streaming import OneByOne, StreamedModel
from lmprune.healing.keeping import Kept
from lmprune.models.carrying import cut_fields, cut_names, tensor_changes
from lmprune.models.checkpoint import INDEX, SINGLE, read_config
from lmprune.models.companions import copy_companions
from lmprune.models.cut import Cut
from lmprune.models.fields import apply_fields
from lmprune.models.in_files import Files
from lmprune.models.stack import find_stack
from lmprune.models.tensors import read_tensor

_SHARD_BYTES = 1 << 30


def streams(cut: Cut, base: Cut, device: str, asked: bool | None) -> bool:
    """Whether the two are read layer by layer: as asked, else where they do not fit in memory together."""
    return asked if asked is not None else not fits(weights_bytes(cut, 4) + weights_bytes(base, 4), device)


def one_by_one(cut: Cut, device: str) -> OneByOne:
    """The model of ``cut`` in float32."""
    return OneByOne(StreamedModel(cut, dtype="float32", device=torch.device(device)))


def in_files(cut: Cut, base: Cut, folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Both models, live and in float32, their weights in files of ``folder``, where one at a time is not enough.

    A smaller hidden size changes all layers by what the whole model's norms are.
    """
    files, where = Files(folder), torch.device("cpu")
    student, whole = (StreamedModel(each, dtype="float32", device=where).in_files(files) for each in (cut, base))
    return student, whole


def check_in_files(cut: Cut, base: Cut, device: str, out: Path) -> None:
    """Make sure, before any work, that `in_files` can be and what comes of it be written to ``out``.

    Raises:
        UsageError: they are wanted on a GPU.
        ModelError: layers share tensors, or one of theirs cannot be written by itself.
        OutputError: the disk has no room.
    """
    where = torch.device(device)
    if where.type != "cpu":
        raise UsageError(
            f"both models have no room on {where}, or --stream was given, and a smaller hidden size is then refitted "
            "with weights in files. Give --device cpu"
        )
    streamed = StreamedModel(cut, dtype="float32", device=where)
    streamed.check_apart()
    for place, layer in enumerate(find_stack(cut.empty()).layers):
        streamed.check_stored(place, [name for name, _ in layer.named_parameters()])
    check_room(out, weights_bytes(cut, 4) + weights_bytes(base, 4), "the weights of both models")


@torch.no_grad()
def streamed_losses(
    cut: Cut, blocks: NDArray[np.int32], device: str, *, batch: int, unscored: int | None = None
) -> Losses:
    """As `lmprune.forward.loss.held_out_losses`, in float32."""
    where = torch.device(device)
    streamed = StreamedModel(cut, dtype="float32", device=where)
    batches = [Batch.of(list(blocks[at : at + batch]), where) for at in range(0, len(blocks), batch)]
    sums: dict[int, NDArray[np.float64]] = {}

    def take(number: int, cuts: Sequence[int], output: Any) -> None:
        sums[number] = block_sums(output.logits[:, :-1], targets(batches[number].ids[:, 1:], unscored))

    streamed.logits(batches, [Plan(streamed.layers)], take)
    return of_sums(np.concatenate([sums[number] for number in range(len(batches))]), blocks, unscored)


def write_changed(cut: Cut, kept: Kept, folder: Path) -> None:
    """``cut`` as a plain checkpoint in ``folder``, with the tensors of the solved layers in place of its own."""
    plan = cut.plan or Plan(cut.layers)
    tensors = cut.checkpoint.tensors
    names, changes = cut_names(tensors, plan), tensor_changes(tensors, plan, _config(cut))
    solved = _solved(cut, kept)
    solved_head = kept.head()
    dtype = getattr(torch, cut.recipe.dtype) if cut.recipe is not None and cut.recipe.dtype else None
    shards: list[dict[str, Tensor]] = [{}]
    where: dict[str, int] = {}
    total = size = 0
    for old in sorted(names, key=lambda name: (tensors[name].file, tensors[name].start)):
        tensor = read_tensor(tensors[old])
        new = changes[old](tensor) if old in changes else tensor
        if old in solved:
            layer, name = solved[old]
            new = _of_layer(kept, layer, name) if layer is not None else solved_head[name]
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        new = new.to(kind).contiguous()
        if size and size + new.nbytes > _SHARD_BYTES:
            _write(folder, shards)
            size = 0
        shards[-1][names[old]] = new
        where[names[old]] = len(shards) - 1
        size, total = size + new.nbytes, total + new.nbytes
    _write(folder, shards)
    _finish(folder, where, total)
    write_json(folder / "config.json", apply_fields(read_config(cut.base.path), cut_fields(_config(cut), plan)))
    copy_companions(cut.base.path, folder)


def _config(cut: Cut) -> dict[str, Any]:
    config: dict[str, Any] = cut.whole_config.to_dict()
    return config


def _solved(cut: Cut, kept: Kept) -> dict[str, tuple[int | None, str]]:
    """By its name in the base's files, the layer (of the whole model; None: the head) and the name in it of a tensor
    that was solved."""
    streamed = StreamedModel(cut, dtype="float32", device=torch.device("cpu"))
    origin = cut.origin.plan
    assert origin is not None, "a repair knows what is missing"
    places = {layer: place for place, layer in enumerate(origin.kept)}
    found: dict[str, tuple[int | None, str]] = {}
    for name in kept.head():
        stored = streamed.stored_as(None, name)
        assert stored is not None, "a head of its own is stored as it is"
        found[stored] = None, name
    for layer in kept.layers():
        for name in kept.names(layer):
            stored = streamed.stored_as(places[layer], name)
            assert stored is not None, "it was checked before it was solved"
            found[stored] = layer, name
    return found


def _of_layer(kept: Kept, layer: int, name: str) -> Tensor:
    known = kept.of(layer)
    assert known is not None
    return known.tensors[name]


def _write(folder: Path, shards: list[dict[str, Tensor]]) -> None:
    """Write the last of the shards and begin another; only its names stay in memory."""
    save_file(shards[-1], folder / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
    shards[-1] = {}
    shards.append({})


def _finish(folder: Path, where: dict[str, int], total: int) -> None:
    """Give the shards their names, and an index where there are several."""
    count = max(where.values()) + 1
    files = [SINGLE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    for number, file in enumerate(files, 1):
        (folder / f"part-{number}.safetensors").rename(folder / file)
    if count > 1:
        weight_map = {name: files[number] for name, number in sorted(where.items())}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
