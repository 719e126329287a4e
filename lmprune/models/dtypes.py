"""Types of weights: their names here, in safetensors and in torch, and how weights are loaded in 4 or 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmprune.errors import UsageError, nearest
from lmprune.settings import DTYPES, QUANTIZATIONS, Quantization

if TYPE_CHECKING:
    import torch

SHORT = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Floating types by torch's name -> as safetensors spells them."""
WIDTH = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of one number."""
_STORED = {
    **{short: name for name, short in SHORT.items()},
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def torch_dtype(name: str) -> torch.dtype:
    """The type called ``name``, such as ``bfloat16``.

    Raises:
        UsageError: there is none.
    """
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise UsageError(f"--dtype {name!r} does not exist{nearest(name, DTYPES)}. Choose {', '.join(DTYPES)}")
    return found


def stored_type(short: str) -> torch.dtype | None:
    """torch's type for safetensors' spelling; None where torch has none."""
    import torch

    return getattr(torch, _STORED[short]) if short in _STORED else None


def check_quantization(name: str | None, option: str = "--quantization") -> Quantization | None:
    """``name``, if it is a way to load weights in few bits, or None.

    Raises:
        UsageError: it is neither.
    """
    if name is None:
        return None
    for known in QUANTIZATIONS:
        if name == known:
            return known
    raise UsageError(f"{option} {name!r} does not exist{nearest(name, QUANTIZATIONS)}. Choose nf4 or int8")


def quantization_config(name: Quantization) -> Any:
    """bitsandbytes' settings: int8, or NF4 quantised twice and computing in bfloat16 (QLoRA, arXiv 2305.14314)."""
    import torch
    from transformers import BitsAndBytesConfig

    if check_quantization(name) == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def packed_tensors(model: Any) -> list[torch.Tensor]:
    """What bitsandbytes' modules hold besides parameters and buffers, ready to be shared by copies of the modules.

    An int8 module takes its numbers and scales from its weight at its first call, and the weight then has none left for
    another module of the same weight: so they are taken here, before there are copies.
    """
    held = []
    for module in model.modules():
        if not hasattr(module, "init_8bit_state"):
            continue
        if module.weight.CB is not None:
            module.init_8bit_state()
        held += [tensor for tensor in (module.state.CB, module.state.SCB) if tensor is not None]
    return held
