"""How a `Compensation` is carried out: tensors are multiplied, as mergekit does it by the same filters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from lmprune.cuts.compensation import Compensation
from lmprune.cuts.plan import Plan
from lmprune.errors import ModelError
from lmprune.models.mlps import Source

if TYPE_CHECKING:
    from torch import Tensor, nn


def fields(part: Compensation, plan: Plan, config: Any) -> Mapping[str, Any]:
    """No field of a config changes."""
    return {}


def changes(part: Compensation, plan: Plan, source: Source) -> dict[str, Callable[[Tensor], Tensor]]:
    """What the tensors that write states are multiplied by.

    Raises:
        ModelError: this checkpoint has no tensor of a name that the part says.
    """
    factors = {name: _factor(part, name, source.within.get(name, (None, ""))[0]) for name in source.shapes}
    for wanted in (*part.layers, *part.embeddings, *part.norms):
        if not any(wanted in name for name in source.shapes):
            raise ModelError(f"the recipe scales {wanted}, and this checkpoint holds nothing of that name")
    return {name: partial(_times, factor) for name, factor in factors.items() if factor != 1}


def live(part: Compensation, plan: Plan, model: nn.Module) -> None:
    """Multiply the parameters of a live model, which has lost the dropped layers already; others that share them keep
    theirs."""
    from torch import nn

    from lmprune.models.in_files import placed
    from lmprune.models.stack import find_stack, unwrapped

    inner, path = unwrapped(model), find_stack(model).path
    made: dict[int, nn.Parameter] = {}
    for name, parameter in inner.named_parameters():
        number, _, _ = name.removeprefix(f"{path}.").partition(".")
        layer = plan.kept[int(number)] if name.startswith(f"{path}.") else None
        if (factor := _factor(part, name, layer)) != 1:
            scaled = placed(inner, _times(factor, parameter.detach()))
            made[id(parameter)] = nn.Parameter(scaled, parameter.requires_grad)
    for module in inner.modules():
        for name, held in module._parameters.items():
            if held is not None and id(held) in made:
                module._parameters[name] = made[id(held)]


def _factor(part: Compensation, name: str, layer: int | None) -> float:
    """That of a tensor of ``layer``; None stands for what lies outside of the layers."""
    if layer is not None:
        return part.of(layer) if any(writer in name for writer in part.layers) else 1.0
    if any(embedding in name for embedding in part.embeddings):
        return part.everywhere
    return 1 / part.everywhere if any(norm in name for norm in part.norms) else 1.0


def _times(factor: float, tensor: Tensor) -> Tensor:
    return tensor * factor
