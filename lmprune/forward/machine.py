"""What fits: weights, states and batches against the memory that is free."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from lmprune.models.checkpoint import Checkpoint
from lmprune.models.fields import layer_count

_ALL_TOKENS_BYTES = 1 << 30
"""Room for the states of a batch when every token is kept: the bounded chunk."""
_ROUND_TOKENS = {"cpu": 1 << 15}
_ROUND_TOKENS_ELSEWHERE = 1 << 18
"""Tokens in a round of --stream, from which on computing a layer takes longer than reading the next."""
_SPARE = 0.9


def decoder_fields(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The decoder's part of a model's config: multimodal models nest it."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder's states."""

    layers: int
    width: int
    itemsize: int

    @classmethod
    def of(cls, config: Mapping[str, Any], itemsize: int) -> Shape:
        """From a model's config and the bytes of one number."""
        inner = decoder_fields(config)
        width = next((inner[name] for name in ("hidden_size", "n_embd", "d_model") if inner.get(name)), 1)
        return cls(layer_count(config), int(width), itemsize)

    def token_bytes(self, token: str, length: int) -> float:
        """Bytes of the kept states of one token of a sample of ``length`` tokens."""
        kept = self.layers + 1 if token == "all" else (self.layers + 1) / length
        return kept * self.width * self.itemsize


def batch_size(shape: Shape, token: str, length: int, device: str) -> int:
    """Samples of ``length`` tokens in a forward pass, to start with."""
    usual = 8 if device == "cpu" else 32
    if token == "last":
        return usual
    return max(1, min(usual, int(_ALL_TOKENS_BYTES / (shape.token_bytes(token, length) * length))))


def batches_at_once(shape: Shape, token: str, length: int, size: int, device: str) -> int:
    """Batches whose states can wait together in a quarter of the free memory, and no more than are of use."""
    # The next layer's input and the embedding wait, besides what the statistics keep.
    waiting = 2 * shape.width * shape.itemsize + shape.token_bytes(token, length)
    fit = free_memory("cpu") / 4 / waiting
    tokens = min(fit, _ROUND_TOKENS.get(device, _ROUND_TOKENS_ELSEWHERE))
    return max(1, int(tokens / (length * size)))


def weights_bytes(checkpoint: Checkpoint, itemsize: int) -> int:
    """Bytes of the weights once loaded with ``itemsize`` bytes a number."""
    count = 0
    for entry in checkpoint.tensors.values():
        numbers = 1
        for side in entry.shape:
            numbers *= side
        count += numbers
    return count * itemsize


def fits(weights: int, device: torch.device) -> bool:
    """Whether weights of so many bytes can be held on ``device``."""
    return weights < _SPARE * free_memory(str(device))


def free_memory(device: str) -> int:
    """Free bytes on a device; on the CPU within the limits of its control group and of ``ulimit``."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    free = [psutil.virtual_memory().available]
    usage = psutil.Process().memory_info()
    for limit, used in ((resource.RLIMIT_AS, usage.vms), (resource.RLIMIT_DATA, getattr(usage, "data", usage.rss))):
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY:
            free.append(soft - used)
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no control group of version 2, or "max": no limit
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(free))
