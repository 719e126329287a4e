"""How much goes through the model at once, by the size of the states that are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmprune.forward.machine import free_memory
from lmprune.models.fields import layer_count

_ALL_TOKENS_BYTES = 1 << 30
"""Room for the states of a batch when every token is kept: the bounded chunk."""
_ROUND_TOKENS = {"cpu": 1 << 15}
_ROUND_TOKENS_ELSEWHERE = 1 << 18
"""Tokens in a round of --stream, from which on computing a layer takes longer than reading the next."""


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
