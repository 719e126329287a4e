"""From a model folder to a live model: whole, or only the layers that a plan keeps."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lmprune.errors import ModelError
from lmprune.models.checkpoint import Checkpoint, layer_prefix, read_config, renamed
from lmprune.models.fields import pruned_config
from lmprune.plan import LayerPlan

Quantization = Literal["nf4", "int8"]


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's config, resolved by transformers."""
    raw = read_config(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as exc:
        line = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise ModelError(f"{folder}: transformers cannot read the config of {raw.get('model_type')!r}: {line}") from exc


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, TypeError) as exc:
        raise ModelError(f"{folder} holds no tokenizer that can be loaded. Copy the model's tokenizer files there") from exc


def model_class(config: Any) -> Any:
    """The class of causal language model that belongs to ``config``."""
    try:
        return AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError as exc:
        raise ModelError(f"transformers has no causal language model for {config.model_type!r}") from exc


def load_model(
    folder: Path,
    *,
    plan: LayerPlan | None = None,
    dtype: str = "auto",
    device: str | None = None,
    device_map: Any = None,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    **kwargs: Any,
) -> Any:
    """The model in ``folder`` in eval mode; with a ``plan``, only the layers that it keeps are read."""
    config = load_config(folder, trust_remote_code=trust_remote_code)
    if quantization is not None:
        kwargs["quantization_config"] = _quantization_config(quantization)
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    if device_map is not None or device is not None:
        kwargs["device_map"] = device_map if device_map is not None else {"": device}
    cls = model_class(config)
    checkpoint = Checkpoint.open(folder)
    names = {name: name for name in checkpoint.tensors}
    if plan is not None:
        config = type(config).from_dict(pruned_config(config.to_dict(), plan.kept))
        names = renamed(names, layer_prefix(names, plan.layers), plan.kept, plan.layers)
    if dtype == "auto":
        kwargs["dtype"] = config.dtype or "auto"
    else:
        kwargs["dtype"] = getattr(torch, dtype)
    with ExitStack() as files:
        opened = {
            path: files.enter_context(safe_open(path, framework="pt"))
            for path in {checkpoint.tensors[old].file for old in names}
        }
        state = {new: opened[checkpoint.tensors[old].file].get_slice(old) for old, new in names.items()}
        model, info = cls.from_pretrained(None, config=config, state_dict=state, output_loading_info=True, **kwargs)
    problems = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    for key, found in problems.items():
        raise ModelError(f"{folder} does not fit its config: {len(found)} {key.replace('_', ' ')}, such as {found[0]!r}")
    model.config._name_or_path = str(folder)
    return model.eval()


def _quantization_config(quantization: Quantization) -> Any:
    if quantization == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
