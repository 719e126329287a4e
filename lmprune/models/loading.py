"""From a model folder to a live model: whole, or only the layers that a plan keeps."""

from __future__ import annotations

import math
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.quantizers import AutoHfQuantizer

from lmprune.cuts.plan import Plan
from lmprune.errors import ModelError, line_of, shown, told_as
from lmprune.files import read_json
from lmprune.models.carrying import Change, cut_config, cut_names, finish_live, tensor_changes
from lmprune.models.checkpoint import Checkpoint, read_config
from lmprune.models.companions import TEXT, TOKENIZER, check_regular, generation_config
from lmprune.models.dtypes import quantization_config, stored_type, torch_dtype
from lmprune.models.fields import layer_count
from lmprune.quiet import no_load_report, panics_unsaid
from lmprune.settings import Quantization


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's config with every default resolved.

    Raises:
        ModelError: it is missing, unreadable, of an unknown type, or needs code that is not trusted.
    """
    raw = read_config(folder)
    if raw.get("auto_map") and not trust_remote_code and raw.get("model_type") not in CONFIG_MAPPING:
        raise ModelError(
            f"{folder} needs its own Python code, which only recipe, prune and verify run, with --trust-remote-code"
        )
    if not isinstance(raw.get("model_type", ""), str):
        raise ModelError(f"{folder}/config.json: model_type is {shown(raw['model_type'])}, which is no name")
    what = f"{folder}: transformers cannot read this config of type {shown(raw.get('model_type'))}"
    with told_as(ModelError, what):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        try:
            layer_count(config.to_dict())
        except ModelError as exc:
            raise ModelError(f"{folder}: {exc}") from exc
    return config


def lacking(config: PreTrainedConfig) -> str | None:
    """What this machine lacks to run a model that is stored quantised, in the host's words; None where it can."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    try:
        AutoHfQuantizer.from_config(stored, pre_quantized=True).validate_environment(device_map=None)
    except Exception as exc:  # whatever is written there
        return line_of(exc)
    return None


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ModelError: the folder holds none that can be loaded.
    """
    if not any((folder / name).is_file() for name in TOKENIZER):
        raise ModelError(
            f"{folder} holds no tokenizer. Copy tokenizer.json and tokenizer_config.json of the model there"
        )
    for pattern in TEXT:
        for file in folder.glob(pattern):
            check_regular(file)
    _check_growth(folder / "tokenizer.json")
    with told_as(ModelError, f"the tokenizer in {folder} cannot be loaded"), panics_unsaid():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _check_growth(path: Path) -> None:
    """Refuse a tokenizer whose normalisation makes thousands of letters of one, as nobody's does but a bomb's.

    Raises:
        ModelError: it does, or cannot be read.
    """
    try:
        data = read_json(path, ModelError, "Download it again")
    except FileNotFoundError:
        return
    grown, left = 1, [data.get("normalizer") if isinstance(data, dict) else None]
    while left and grown <= _GROWTH:
        step = left.pop()
        if not isinstance(step, dict):
            continue
        for name in ("content", "prepend"):
            grown *= max(1, len(step[name])) if isinstance(step.get(name), str) else 1
        nested = step.get("normalizers")
        left += nested if isinstance(nested, list) else []
    if grown > _GROWTH:
        raise ModelError(f"{path}: its normalizers make more than {_GROWTH:,} letters of one. Download it again")


_GROWTH = 4096


def model_class(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> type[PreTrainedModel]:
    """The concrete class of causal language model for ``config``.

    Raises:
        ModelError: transformers knows none.
    """
    custom = getattr(config, "auto_map", None) or {}
    if trust_remote_code and "AutoModelForCausalLM" in custom:
        remote: type[PreTrainedModel] = get_class_from_dynamic_module(
            custom["AutoModelForCausalLM"], config._name_or_path
        )
        return remote
    try:
        known = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError as exc:
        raise ModelError(
            f"transformers {transformers.__version__} has no causal language model for {config.model_type!r}"
        ) from exc
    cls: type[PreTrainedModel] = known[0] if isinstance(known, tuple) else known
    return cls


def decoder_config(config: PreTrainedConfig, cls: type[PreTrainedModel]) -> PreTrainedConfig:
    """The config that ``cls`` is built from: the text part where a multimodal model has a text-only class."""
    text = config.sub_configs.get("text_config")
    return config.get_text_config() if text is not None and cls.config_class is text else config


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal language model of ``config`` without weights, on the meta device."""
    cls = model_class(config)
    with torch.device("meta"), told_as(ModelError, f"no {cls.__name__} can be made of this config"):
        return cls(decoder_config(config, cls))


def context_window(config: PreTrainedConfig) -> int | None:
    """Tokens that the model reads at most; None where it names no limit."""
    # An attribute and not a field: GPT-2 spells it n_positions. XLNet says -1.
    window = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    return int(window) if window > 0 else None


def load_model(
    folder: Path,
    *,
    plan: Plan | None = None,
    dtype: str = "auto",
    device: str | None = None,
    device_map: Any = None,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """The model in ``folder`` in eval mode; with a ``plan``, only the layers that it keeps are read.

    Tensors are read one by one as the model takes them, so memory and bytes read follow what is kept.

    Args:
        dtype: ``auto`` for the type that the config names or the tensors have, or a type such as ``bfloat16``.
        device: where the whole model goes; ``device_map`` spreads it instead.
        quantization: load the linear layers in 4 or 8 bits with bitsandbytes.
        kwargs: handed on to ``from_pretrained``.

    Raises:
        ModelError: the folder is unreadable, its tensors do not fit its config, or the plan cannot be expressed.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    cls = model_class(config, trust_remote_code=trust_remote_code)
    checkpoint = Checkpoint.open(folder)
    names = text_part(cut_names(checkpoint.tensors, plan), config.model_type)
    changes = tensor_changes(checkpoint.tensors, plan, config.to_dict())
    if plan is not None:
        with told_as(ModelError, f"{folder}: no config describes this cut"):
            config = type(config).from_dict(cut_config(config.to_dict(), plan))
    if quantization is not None:
        kwargs["quantization_config"] = quantization_config(quantization)
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    if device_map is not None or device is not None:
        kwargs["device_map"] = device_map if device_map is not None else {"": device}
    if (drawn := generation_config(folder)) is not None:
        kwargs.setdefault("generation_config", drawn)
    config = decoder_config(config, cls)
    _check_size(config, cls, checkpoint)
    kwargs["dtype"] = dtype_of(dtype, config, checkpoint)
    model = _from_tensors(cls, config, checkpoint, names, changes, kwargs)
    finish_live(model, plan)
    model.config._name_or_path = str(folder)
    return model.eval()


def _check_size(config: PreTrainedConfig, cls: type[PreTrainedModel], checkpoint: Checkpoint) -> None:
    """Refuse a config of a far larger model than the weights are of, before memory is taken for it.

    Raises:
        ModelError: it is.
    """
    largest = max((side for entry in checkpoint.tensors.values() for side in entry.shape), default=0)
    sizes = [value for value in config.to_dict().values() if type(value) is int]
    if max(sizes, default=0) < 2 * largest:
        return  # no need to build it
    with torch.device("meta"), told_as(ModelError, f"no {cls.__name__} can be made of this config"):
        wanted = sum(parameter.numel() for parameter in cls(config).parameters())
    stored = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
    if wanted > _PACKED * stored + _SLACK:
        raise ModelError(
            f"{checkpoint.folder} does not fit its config, which is of {wanted:,} parameters: the weights are of "
            f"{stored:,}"
        )


_PACKED, _SLACK = 16, 1 << 24
"""Numbers of a model that one stored number may hold, and those that no file may hold."""


def _from_tensors(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    checkpoint: Checkpoint,
    names: dict[str, str],
    changes: dict[str, Change],
    kwargs: Any,
) -> PreTrainedModel:
    """A model of ``checkpoint``'s tensors under new ``names``, old -> new, each read when the model takes it.

    Raises:
        ModelError: a tensor is missing, left over or of another shape, or the host fails.
    """
    with ExitStack() as files:
        with told_as(ModelError, f"the weights in {checkpoint.folder} cannot be read"):
            opened = {
                path: files.enter_context(safe_open(path, framework="pt"))
                for path in {checkpoint.tensors[old].file for old in names}
            }
        state: dict[str, Any] = {new: opened[checkpoint.tensors[old].file].get_slice(old) for old, new in names.items()}
        state |= {names[old]: _Changed(state[names[old]], change) for old, change in changes.items() if old in names}
        with told_as(ModelError, f"{checkpoint.folder} cannot be loaded as {cls.__name__}"), no_load_report():
            # key_mapping= would rename too, but gives wrong weights (transformers 5.23).
            # Other shapes are let through, since the report below names them and the host's error does not.
            model, info = cls.from_pretrained(
                None,
                config=config,
                state_dict=state,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kwargs,
            )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            problem, example = kind.replace("_", " "), min(info[kind])
            if not isinstance(example, str):
                name, stored, wanted = example
                example = f"{name}, which is {list(stored)} where the config says {list(wanted)}"
            raise ModelError(
                f"{checkpoint.folder} does not fit its config: {len(info[kind])} {problem}, such as {example}"
            )
    loaded: PreTrainedModel = model
    return loaded


def require_numbers(logits: torch.Tensor, name: str) -> None:
    """Refuse to work on a model that computes nothing.

    Raises:
        ModelError: its logits are not all finite.
    """
    if not bool(logits.isfinite().all()):
        raise ModelError(
            f"{name} computes no numbers but NaN or infinity: its weights are broken, or too large for the type it "
            "computes in. Download it again, or use float32"
        )


class _Changed:
    """A tensor of a file that is read, and changed, when the model takes it."""

    def __init__(self, stored: Any, change: Change) -> None:
        self._stored, self._change = stored, change

    def __getitem__(self, key: Any) -> torch.Tensor:
        return self._change(self._stored[...])[key]


_TEXT_PARTS = {
    "dots3_note": r"((?:model|lm_head)\..+)",
    "emu3": r"text_model\.(.+)",
    "mllama": r"language_model\.(.+)",
}
"""Types of which transformers' causal language model does not find its own tensors among those of the whole: which
they are, and what it calls them."""


def text_part(names: dict[str, str], model_type: str) -> dict[str, str]:
    """Of ``names``, old -> new, those that the causal language model takes, under the names that it knows."""
    pattern = _TEXT_PARTS.get(model_type)
    if pattern is None:
        return names
    return {old: found[1] for old, new in names.items() if (found := re.fullmatch(pattern, new))}


def dtype_of(dtype: str, config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The type to load in; ``auto`` is the config's, or else that of most bytes in the checkpoint."""
    if dtype != "auto":
        return torch_dtype(dtype)
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    sizes: dict[str, int] = {}
    for entry in checkpoint.tensors.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.stop - entry.start
    most = stored_type(max(sizes, key=lambda name: sizes[name]))
    return most if most is not None and most.is_floating_point else torch.float32
