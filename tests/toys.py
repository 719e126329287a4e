"""Small random models whose layers all matter, and cuts of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers

from lmprune.cuts.plan import Plan
from lmprune.models.carrying import cut_live

LAYERS, VOCABULARY = 6, 96
SMALL: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd"), 32),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    "intermediate_size": 48,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "head_dim": 8,
    "num_local_experts": 4,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model_of(kind: str, **more: Any) -> Any:
    """A random model of that type whose layers all matter."""
    config = transformers.CONFIG_MAPPING[kind]
    defaults = config()
    fixed = {name for name in SMALL if isinstance(getattr(config, name, None), property)}
    values = {name: value for name, value in SMALL.items() if hasattr(defaults, name) and name not in fixed}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(**values | more)).float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        elif not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def student_of(whole: Any, plan: Plan) -> Any:
    """A copy that is cut."""
    student = copy.deepcopy(whole)
    cut_live(student, plan)
    return student
