"""Repairing configs: what is known by name, what is refused, and that no field of transformers is unknown to us."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lmprune.errors import ModelError
from lmprune.models.fields import (
    COUNTS,
    LAYER_IDS,
    LEADING,
    PER_LAYER,
    RULED,
    apply_fields,
    changed_fields,
    fitting_sets,
    layer_count,
    pruned_config,
)

KEPT = (0, 1, 2, 6, 7)
KNOWN = {*COUNTS, *PER_LAYER, *LAYER_IDS, *LEADING, *RULED}
IGNORED = {
    "encoder_layers": "the encoder is not pruned",
    "num_encoder_layers": "the encoder is not pruned",
    "num_decoder_layers": "ProphetNet, which is refused for naming no other number of layers",
    "final_w_init_variance_scale": "only for initialisation",
    "no_rope_layer_interval": "no_rope_layers is written out",
    "interleave_moe_layer_step": "moe_layers is written out",
    "max_window_layers": "layer_types is written out",
    "sliding_window_pattern": "layer_types is written out",
    "_sliding_window_pattern": "layer_types is written out",
    "prefix_dense_sliding_window_pattern": "layer_types is written out",
    "global_attn_every_n_layers": "layer_types is written out",
    "layer_group_size": "layer_types is written out",
    "mtp_layer_types": "layers behind the last",
    "mtp_mlp_layer_types": "layers behind the last",
    "mtp_layers_block_type": "layers behind the last",
    "mtp_local_layer_ids": "layers behind the last",
    "mtp_hidden_states_first": "layers behind the last",
    "mtp_loss_scaling_factor": "layers behind the last",
    "num_mtp_layers": "layers behind the last",
    "adapter_reuse_layer_norm": "not about layer numbers",
    "attn_layers": "Reformer, which is refused",
    "rescale_every": "RWKV, which is refused",
    "layerdrop": "training only",
    "decoder_layerdrop": "training only",
    "encoder_layerdrop": "training only",
    "altup_active_idx": "an index of predictions, not of layers",
    "vocab_size_per_layer_input": "goes with hidden_size_per_layer_input",
    "use_weighted_layer_sum": "classification only",
}
"""Fields that look as if they were about layer numbers, and why they are none of ours."""
LOOKS_LIKE_LAYERS = re.compile(
    r"layer(s|_types?|_ids|_idx|_ind\w*|_period|_offset|_interval|_step|_start\w*|_end\w*|_pattern|drop|_input|_sum"
    r"|_group\w*)$|layers_|layer_rope|every|_interval$|_period$|pattern|first_k|nextn|mtp|block_types?$|sparse_step"
    r"|indexer_types|attention_types|_idxs$|inverse_layer"
)
OTHER_PARTS = re.compile(
    r"(vision|audio|vq|encoder|decoder|patcher|global|depth_decoder|audio_encoder|text_encoder|backbone)(_config)?\."
)


MORE_THAN_A_COUNT: dict[str, Callable[[int], dict[str, Any]]] = {
    "gemma4_assistant": lambda n: {
        "text_config": {"num_hidden_layers": n, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "gpt_neo": lambda n: {"num_layers": n, "attention_types": [[["global", "local"], n // 2]]},
    "prophetnet": lambda n: {"num_decoder_layers": n, "num_encoder_layers": n},
    "zamba2": lambda n: {"num_hidden_layers": n, "layers_block_type": ["linear_attention", "hybrid"] * (n // 2)},
}
"""Config classes that refuse a mere number of layers, and what they want with it."""


def config_of(kind: str, layers: int) -> dict[str, Any]:
    """The default config of that many layers, flat, with dotted names."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[kind]
    count: dict[str, Any] = {"num_hidden_layers": layers}
    if kind in MORE_THAN_A_COUNT:
        config = cls(**MORE_THAN_A_COUNT[kind](layers))
    else:
        config = cls(text_config=count) if "text_config" in cls.sub_configs else cls(**count)
    return dict(flat(config.to_dict()))


def flat(config: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and key != "per_layer_config":
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_no_field_of_transformers_is_unknown() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    unknown: dict[str, str] = {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        few, many = config_of(kind, 8), config_of(kind, 12)
        for dotted, value in few.items():
            name = dotted.rpartition(".")[2]
            if name in KNOWN or name in IGNORED or OTHER_PARTS.match(dotted):
                continue
            per_layer = isinstance(value, list) and len(value) == 8 and len(many.get(dotted) or ()) == 12
            if per_layer or value != many.get(dotted) or LOOKS_LIKE_LAYERS.search(name):
                unknown.setdefault(dotted, f"{kind}: {value!r} with 8 layers, {many.get(dotted)!r} with 12")
    assert not unknown, f"fields that lmprune neither handles nor ignores with a reason: {unknown}"


def test_known_and_ignored_do_not_overlap() -> None:
    assert not KNOWN & set(IGNORED)


def test_per_layer_lists_are_indexed_not_cut() -> None:
    config = {"num_hidden_layers": 8, "layer_types": list("abcdefgh"), "other": list("abcdefgh")}
    pruned = pruned_config(config, KEPT)
    assert pruned["layer_types"] == list("abcgh")
    assert pruned["other"] == list("abcdefgh"), "a list of that length is not thereby per layer"
    assert pruned["num_hidden_layers"] == 5
    assert config["num_hidden_layers"] == 8, "the original is left alone"


def test_layer_ids_are_renumbered() -> None:
    assert pruned_config({"num_hidden_layers": 8, "moe_layers": [1, 3, 7]}, KEPT)["moe_layers"] == [1, 4]


def test_leading_layers_are_recounted() -> None:
    config = {"num_hidden_layers": 8, "first_k_dense_replace": 4}
    assert pruned_config(config, KEPT)["first_k_dense_replace"] == 3


def test_a_sparse_step_becomes_a_list() -> None:
    config = {"num_hidden_layers": 8, "decoder_sparse_step": 2, "mlp_only_layers": [7]}
    pruned = pruned_config(config, KEPT)
    assert (pruned["decoder_sparse_step"], pruned["mlp_only_layers"]) == (1, [0, 2, 3, 4])


def test_experts_of_ernie_are_expressed_or_refused() -> None:
    config = {"num_hidden_layers": 8, "moe_layer_interval": 1, "moe_layer_start_index": 2, "moe_layer_end_index": 6}
    pruned = pruned_config(config, KEPT)
    start, end = pruned["moe_layer_start_index"], pruned["moe_layer_end_index"]
    assert pruned["moe_layer_interval"] == 1 and [start <= i <= end for i in range(5)] == [
        False,
        False,
        True,
        True,
        False,
    ]
    with pytest.raises(ModelError, match="Nearest that fit: keep "):
        pruned_config(config | {"moe_layer_interval": 2, "moe_layer_start_index": 0, "moe_layer_end_index": 7}, KEPT)


def test_jamba_keeps_its_period_or_is_refused() -> None:
    config = {"model_type": "jamba", "num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 1,
              "expert_layer_period": 2, "expert_layer_offset": 1}  # fmt: skip
    assert pruned_config(config, (0, 1, 2, 3))["attn_layer_period"] == 4
    with pytest.raises(ModelError, match=r"only say experts at a fixed period.*Nearest"):
        pruned_config(config, (0, 1, 3, 4, 5))
    assert all(len(kept) == 5 for kept in fitting_sets(config, (0, 1, 3, 4, 5)))


def test_shared_keys_keep_their_source_or_are_refused() -> None:
    config = {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": ["s", "s", "f", "s", "s", "f"]}
    assert pruned_config(config, (0, 2, 3, 4, 5))["num_kv_shared_layers"] == 2
    assert pruned_config(config, (0, 1, 2, 3))["num_kv_shared_layers"] == 0
    with pytest.raises(ModelError, match="layer 4 reads the keys and values of layer 3"):
        pruned_config(config, (0, 1, 2, 4, 5))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "diffllama", "num_hidden_layers": 8}, "layer 6 would change its place"),
        ({"model_type": "gpt2", "n_layer": 8, "scale_attn_by_inverse_layer_idx": True}, "divides|scales"),
        ({"model_type": "gpt_neox_japanese", "num_hidden_layers": 9}, "layer 8 must stay"),
        ({"model_type": "blt"}, "cannot lose a layer"),
        ({"num_hidden_layers": 8, "layer_types": ["a"] * 7}, "7 entries for 8 layers"),
        ({"model_type": "clip"}, "names no number"),
    ],
)
def test_what_cannot_be_said_is_refused(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as raised:
        changed_fields(config, KEPT)
    assert "\n" not in str(raised.value)


def test_last_layers_may_go_where_layers_know_their_number() -> None:
    assert layer_count(pruned_config({"model_type": "diffllama", "num_hidden_layers": 8}, (0, 1, 2))) == 3


def test_nested_configs_of_multimodal_models() -> None:
    config = {"model_type": "x", "text_config": {"num_hidden_layers": 8, "layer_types": list("abcdefgh")}}
    changes = changed_fields(config, KEPT)
    assert changes == {"text_config.num_hidden_layers": 5, "text_config.layer_types": list("abcgh")}
    assert apply_fields({"text_config": {}}, changes)["text_config"]["num_hidden_layers"] == 5


def test_the_decoder_of_an_encoder_decoder_is_counted() -> None:
    config = {"num_hidden_layers": 4, "encoder_layers": 4, "decoder_layers": 8}
    assert changed_fields(config, KEPT) == {"decoder_layers": 5}


def test_repair_removes_the_other_spelling() -> None:
    repaired = apply_fields(
        {"num_hidden_layers": 8, "layers_block_type": ["a"] * 8}, {"n_layer": 5, "layer_types": ["a"] * 5}
    )
    assert repaired == {"n_layer": 5, "layer_types": ["a"] * 5}


def test_module_names_of_quantised_models_are_renumbered() -> None:
    skipped = ["lm_head", "model.layers.1.mlp", "model.layers.4.mlp", "model.layers.7.mlp"]
    config = {"num_hidden_layers": 8, "quantization_config": {"modules_to_not_convert": skipped}}
    pruned = pruned_config(config, KEPT)
    assert pruned["quantization_config"]["modules_to_not_convert"] == [
        "lm_head",
        "model.layers.1.mlp",
        "model.layers.4.mlp",
    ]
    config["quantization_config"] = {"ignore": [r"re:.*layers\.(3|4)\..*"]}
    with pytest.raises(ModelError, match="cannot renumber"):
        pruned_config(config, KEPT)
