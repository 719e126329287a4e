"""Tiny random models of every causal language model that transformers knows, and what becomes of each when pruned."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 8
IRREGULAR = (0, 1, 2, 6, 7)
CONTIGUOUS = (0, 1, 2, 3, 6, 7)
VOCABULARY = 96
MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

COUNT_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")

SMALL: dict[str, Any] = {
    **dict.fromkeys(COUNT_NAMES, LAYERS),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_dim", "dim_model", "emb_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("embedding_size", "input_embedding_size", "output_embedding_size", "attention_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "dff", "dim_ff", "d_inner"), 48),
    **dict.fromkeys(("ffn_hidden_size", "intermediate_size_mlp", "feed_forward_size", "dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 16),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "global_head_dim", "attention_head_size", "dim_head", "d_head"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "index_head_dim", "kv_channels", "linear_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    "qk_nope_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "rotary_dim": 4,
    "index_n_heads": 2,
    "index_topk": 64,
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length"), 128),
    "context_length": 128,
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), 6),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "laurel_rank", "adapter_rank"), 4),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size", "attention_chunk_size"), 8),
    "hidden_size_per_layer_input": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Names of sizes and the small value each takes; names that a config class lacks are left out."""


def special(model_type: str) -> dict[str, Any]:
    """What a model type needs besides the small sizes."""
    return SPECIAL.get(model_type, {})


SPECIAL: dict[str, dict[str, Any]] = {}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A config of that type, small enough to run anywhere, with `LAYERS` layers where the type allows."""
    cls = CONFIG_MAPPING[model_type]
    values = special(model_type) | changes
    subs = dict(getattr(cls, "sub_configs", {}))
    if "text_config" in subs:
        inner = subs["text_config"]
        text = {k: v for k, v in SMALL.items() if _takes(inner, k)} if inner.__name__ != "AutoConfig" else dict(SMALL)
        return cls(**({"text_config": text | values.pop("text_config", {})} | values))
    return cls(**({k: v for k, v in SMALL.items() if _takes(cls, k)} | values))


def _takes(cls: Any, name: str) -> bool:
    known = getattr(cls, "__dataclass_fields__", {})
    return name in known


def tiny_model(config: Any, *, seed: int = 0) -> Any:
    """A random model of that config, with weights large enough that every layer matters."""
    from lmprune.models.loading import model_class

    torch.manual_seed(seed)
    model = model_class(config)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.ndim >= 2:
                parameter.normal_(0.0, 0.5 / parameter.shape[-1] ** 0.5, generator=generator)
            elif parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def batch() -> torch.Tensor:
    """Token ids (2, 12) within every tiny vocabulary."""
    return (torch.arange(24).view(2, 12) * 7 + 3) % (VOCABULARY - 8) + 4
