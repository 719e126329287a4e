"""Sizes of a live model."""

from __future__ import annotations

from typing import Any

from lmprune.models.patches import maps_of


def tensors(model: Any) -> list[Any]:
    """Parameters and buffers, shared ones once, and the maps of a patch."""
    maps = [tensor for held in maps_of(model) for tensor in held]
    return list({id(tensor): tensor for tensor in [*model.parameters(), *model.buffers(), *maps]}.values())


def parameters(model: Any) -> int:
    """Numbers in the parameters, shared ones once, and in the maps of a patch."""
    maps = [held[0] for held in maps_of(model)]
    return sum(tensor.numel() for tensor in {id(p): p for p in [*model.parameters(), *maps]}.values())


def passed(model: Any) -> int:
    """Numbers in the parameters that every token passes through: all but an embedding that is no head as well, of which
    it takes one row."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    own = embedding is not None and head is not None and embedding.weight is not head.weight
    return parameters(model) - (embedding.weight.numel() if own else 0)


def weight_bytes(model: Any) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(model))


def layers(model: Any) -> int:
    """Decoder layers."""
    from lmprune.models.fields import layer_count

    return layer_count(model.config.to_dict())


def flops(model: Any, ids: Any) -> float | None:
    """Floating-point operations of a prefill for each of its tokens."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    total = counter.get_total_flops()
    return total / ids.numel() if total else None
