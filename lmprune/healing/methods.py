"""Which parameters of a pruned model train: an adapter, the last layers, the layers at the cut, or all."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lmprune.cuts.plan import Plan, runs
from lmprune.errors import UsageError
from lmprune.healing.settings import Resolved
from lmprune.healing.targets import resolve_targets
from lmprune.models.stack import find_stack

_FLOAT_DROPOUTS = ("dropout", "attention_dropout", "attn_dropout", "activation_dropout", "hidden_dropout", "layerdrop")


def prepare(model: nn.Module, settings: Resolved, cut: Plan | None) -> tuple[nn.Module, list[str]]:
    """``model`` with the parameters that train, in float32, and all others frozen; and what the user should be told.

    The model must be cut already: an adapter made before the cut would carry weights of layers that are gone.

    Raises:
        UsageError: the method does not fit the model.
        ModelError: the projections that LoRA should sit on cannot be found.
    """
    silence_dropout(model)
    keep_differentiable(model)
    model.requires_grad_(False)
    if settings.adapter:
        return _with_adapter(model, settings), []
    check_method(model, settings, cut)
    layers = find_stack(model).layers
    notes: list[str] = []
    trained: list[nn.Module]
    if settings.trains == "full":
        trained = [model]
    elif settings.trains == "junction":
        trained = [layers[i] for i in beside_cut(cut)]
    else:
        trained = list(layers[len(layers) - settings.last :])
        head, notes = _head(model, settings.head)
        trained += [head] if head is not None else []
    for module in trained:
        module.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model, notes


def check_method(model: nn.Module, settings: Resolved, cut: Plan | None) -> None:
    """Whether the method fits the model, which may be one without weights.

    Raises:
        UsageError, ModelError: as `prepare`.
    """
    layers = find_stack(model).layers
    if settings.adapter:
        resolve_targets(layers, settings.targets)
    elif settings.trains == "junction":
        beside_cut(cut)
    elif settings.trains == "last-layers" and settings.last > len(layers):
        raise UsageError(f"--last {settings.last}: this model has {len(layers)} layers")


def beside_cut(cut: Plan | None) -> list[int]:
    """Layers of the pruned model that meet at a cut, ascending (CLP's cutoff endpoints, arXiv 2510.23652).

    >>> beside_cut(Plan(12, (5, 6, 7)))
    [4, 5]
    """
    if cut is None:
        raise UsageError("--method junction needs to know where the cut is, and this model does not say. Use --recipe")
    place = {old: new for new, old in enumerate(cut.kept)}
    sides = {side for start, stop in runs(cut.dropped) for side in (start - 1, stop)}
    return sorted(place[side] for side in sides if side in place)


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


def _with_adapter(model: nn.Module, settings: Resolved) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=resolve_targets(find_stack(model).layers, settings.targets),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(settings.seed)
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def _head(model: Any, wanted: str) -> tuple[nn.Module | None, list[str]]:
    """The output head if it is to train."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if wanted == "frozen" or head is None:
        return None, []
    if head.weight is not embeddings.weight:
        return head, []
    if wanted == "auto":
        return None, ["lm_head shares its weights with the embeddings and stays frozen; --head train gives it its own"]
    # Training shared weights would change the input of every layer below, which this method means to leave alone.
    head.weight = nn.Parameter(head.weight.detach().clone())
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    return head, [f"lm_head no longer shares its weights with the embeddings: {head.weight.numel():,} parameters more"]


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that train, by their names in the model."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
