"""Where LoRA sits: the projections of a decoder layer, told apart by their names in each architecture."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from lmprune.errors import ModelError, UsageError

GROUPS = ("ffn", "attention", "all")
_FFN = re.compile(
    r"^(gate_proj|up_proj|down_proj|gate_up_proj|fc1|fc2|fc_in|fc_out|c_fc|c_proj|w1|w2|w3|dense_h_to_4h|dense_4h_to_h"
    r"|input_linear|output_linear|linear_fc1|linear_fc2)$"
)
"""Llama, Qwen, Gemma, Phi-3; OPT, Phi-2; GPT-J; GPT-2; Qwen 1, Mixtral; GPT-NeoX, BLOOM, Falcon; Granite."""
_MIXER = re.compile(r"attn|attention|mixer|mamba|conv|temporal|ssm")
_READ = ("out_proj", "dt_proj", "x_proj")
"""Of a Mamba mixer, maps whose weights its kernels read themselves, past whatever is put around the module."""
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")


def resolve_targets(layers: Iterable[nn.Module], wanted: str) -> list[str]:
    """Module names relative to a layer, such as ``mlp.up_proj``, that PEFT matches by their end.

    Raises:
        UsageError: a name is in no layer.
        ModelError: the wanted projections are fused experts, which are not modules.
    """
    layers = list(layers)
    names = sorted({name for layer in layers for name in linears(layer)})
    if wanted not in GROUPS:
        return [_named(part.strip(), names) for part in wanted.split(",")]
    if wanted != "attention" and (fused := _fused_experts(layers)):
        raise ModelError(
            f"the experts of this model are fused in {fused}, on which LoRA cannot sit. "
            "Use --targets attention, or --method last-layers or junction"
        )
    read = {name for layer in layers for name in _read_by_kernels(layer)}
    chosen = [name for name in names if name not in read and (wanted == "all" or _is_ffn(name) == (wanted == "ffn"))]
    if not chosen:
        raise ModelError(f"no {wanted} projections found in this model. Name some with --targets: {', '.join(names)}")
    return sorted({_without_numbers(name) for name in chosen})


def linears(layer: nn.Module) -> list[str]:
    """Names of the linear maps in a layer, routers left out."""
    return [
        name
        for name, module in layer.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not _ROUTER.search(name)
    ]


def _read_by_kernels(layer: nn.Module) -> list[str]:
    mixers = [name for name, module in layer.named_modules() if hasattr(module, "A_log") and hasattr(module, "D")]
    return [f"{name}.{leaf}".removeprefix(".") for name in mixers for leaf in _READ]


def _is_ffn(name: str) -> bool:
    *parents, leaf = name.split(".")
    return bool(_FFN.match(leaf)) and not any(_MIXER.search(parent) for parent in parents)


def _without_numbers(name: str) -> str:
    """``mlp.experts.3.w1`` -> ``w1``: modules in numbered lists are matched by what follows the number."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :])


def _named(part: str, names: list[str]) -> str:
    if any(name == part or name.endswith(f".{part}") for name in names):
        return part
    raise UsageError(
        f"--targets {part!r} is no projection of this model. Choose ffn, attention, all, or of {', '.join(names)}"
    )


def _fused_experts(layers: list[nn.Module]) -> str | None:
    for layer in layers:
        for name, parameter in layer.named_parameters():
            if parameter.dim() == 3 and "expert" in name:
                return name
    return None
