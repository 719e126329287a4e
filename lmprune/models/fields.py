"""From a config and the layers that stay to the config of the pruned model. Pure: no torch, no transformers.

Fields are known by name: a list that happens to have one entry per layer is not thereby per layer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from lmprune.errors import ModelError

COUNTS = ("decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
SLICED = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "no_rope_layers",
    "attention_layers",
    "indexer_types",
    "layer_rope_theta",
    "num_attention_heads_per_layer",
    "activation_sparsity_pattern",
    "intermediate_size",
)
IDS = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs", "cross_attention_layers")
LEADING = ("first_k_dense_replace", "num_dense_layers")


def section(config: Mapping[str, Any]) -> str | None:
    """The key under which the decoder's fields are nested, or None where they stand at the top."""
    return "text_config" if isinstance(config.get("text_config"), Mapping) else None


def layer_count(config: Mapping[str, Any]) -> int:
    """The number of decoder layers.

    Raises:
        ModelError: the config names none.
    """
    inner = config[section(config)] if section(config) else config  # type: ignore[index]
    for name in COUNTS:
        if isinstance(inner.get(name), int):
            return int(inner[name])
    raise ModelError("the config names no number of layers, so this is not a decoder that lmprune can prune")


def pruned_config(config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """A new config with only the layers ``kept``."""
    return apply_fields(config, changed_fields(config, kept))


def changed_fields(config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Dotted field -> new value, for every field that pruning changes."""
    key = section(config)
    inner = config[key] if key else config
    layers = layer_count(config)
    place = {old: new for new, old in enumerate(kept)}
    changes: dict[str, Any] = {name: len(kept) for name in COUNTS if inner.get(name) == layers}
    for name in SLICED:
        if isinstance(inner.get(name), (list, tuple)):
            changes[name] = [inner[name][i] for i in kept]
    for name in IDS:
        if isinstance(inner.get(name), (list, tuple)):
            changes[name] = [place[i] for i in inner[name] if i in place]
    for name in LEADING:
        if isinstance(inner.get(name), int):
            changes[name] = sum(i < inner[name] for i in kept)
    return {f"{key}.{name}" if key else name: v for name, v in changes.items() if inner.get(name) != v}


def apply_fields(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``config`` with the dotted fields of ``changes`` set."""
    result = copy.deepcopy(dict(config))
    for dotted, value in changes.items():
        *parents, name = dotted.split(".")
        target = result
        for parent in parents:
            target = target.setdefault(parent, {})
        target[name] = copy.deepcopy(value)
    return result
