"""The cut model, live: as it was, and made ready for a method to change it."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from lmprune.cuts.plan import Plan
from lmprune.errors import UsageError
from lmprune.forward.machine import release
from lmprune.healing.methods import Method
from lmprune.models.adapters import merged
from lmprune.models.cut import Cut

logger = logging.getLogger("lmprune")
_FLOAT_DROPOUTS = ("dropout", "attention_dropout", "attn_dropout", "activation_dropout", "hidden_dropout", "layerdrop")


def live(cut: Cut, **how: Any) -> Any:
    """The model of ``cut``, its adapter merged into it; ``how`` is that of `lmprune.models.loading.load_model`.

    Raises:
        UsageError: there is an adapter, and the weights are to be quantised.
    """
    if cut.adapter is not None and how.get("quantization"):
        raise UsageError(
            f"{cut.name} has an adapter, which cannot be merged exactly into quantised weights. Use --method lora"
        )
    model = cut.load(**how)
    return model if cut.adapter is None else merged(model)


def live_where_it_fits(cut: Cut, *, dtype: str, device: str) -> Any:
    """The model, unquantised, on ``device``; on the CPU, slowly, where that has no room for it."""
    try:
        return live(cut, dtype=dtype, device=device)
    except torch.OutOfMemoryError:
        pass  # outside, the exception holds nothing of it any more
    release()
    logger.info("%s does not fit on %s unquantised: working on the CPU for a while", cut.base.path, device)
    return live(cut, dtype=dtype, device="cpu")


def prepare(model: nn.Module, method: Method, cut: Plan | None, seed: int) -> tuple[nn.Module, list[str]]:
    """``model`` with the parameters that change, in float32, and all others frozen; and what the user should be told.

    Raises:
        UsageError, ModelError: the method does not fit the model.
    """
    silence_dropout(model)
    keep_differentiable(model)
    model.requires_grad_(False)
    method.check_model(model, cut)
    student, notes = method.prepare(model, cut, seed)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return student, notes


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that change, by their names in the model."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def silence_dropout(model: nn.Module) -> None:
    """Switch off the base model's own dropout: frozen layers should be one function, for student and teacher alike."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _FLOAT_DROPOUTS:
            if isinstance(module.__dict__.get(name), float):
                setattr(module, name, 0.0)


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on the CPU.

    Its first forward in eval mode (the held-out loss of step 0) would do so, and the packed kernel has no backward:
    gradients then stop at every quantised layer, with no more than a warning.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
