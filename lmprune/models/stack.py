"""The decoder stack of a live model: find it, drop layers for good, or skip them for a while."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from lmprune.errors import ModelError
from lmprune.models.fields import changed_fields, layer_count
from lmprune.plan import LayerPlan

_ELSEWHERE = re.compile(r"(^|\.)(vision\w*|visual|audio\w*|image\w*|speech\w*|encoder|experts|mtp)(\.|$)")
_PLACES = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")
"""The names under which a layer or its parts remember their place in the stack."""


@dataclass(frozen=True)
class Stack:
    """Where a model keeps its decoder layers: ``owner.name`` is ``layers``, at the dotted ``path``."""

    path: str
    layers: nn.ModuleList
    owner: nn.Module
    name: str


def _unwrapped(model: nn.Module) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_stack(model: nn.Module) -> Stack:
    """The list of decoder layers of ``model``; the path is that within the model that an adapter wraps.

    Raises:
        ModelError: no list of modules, or more than one, has as many entries as the config promises layers.
    """
    model = _unwrapped(model)
    count = layer_count(model.config.to_dict())
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and not _ELSEWHERE.search(path)
    ]
    found = [(path, m) for path, m in found if not any(path.startswith(other + ".") for other, _ in found)]
    if len(found) != 1:
        names = ", ".join(path for path, _ in found) or "none"
        raise ModelError(f"cannot tell which modules are the {count} decoder layers. Lists of that length: {names}")
    path, layers = found[0]
    parent, _, name = path.rpartition(".")
    return Stack(path, layers, model.get_submodule(parent), name)


def drop_layers(model: nn.Module, plan: LayerPlan) -> None:
    """Remove the dropped layers in place and for good: modules, configs, and what layers remember of their place."""
    stack = find_stack(model)
    inner = _unwrapped(model)
    kept = plan.kept
    for config in _configs(inner):
        for name, value in changed_fields(config.to_dict(), kept).items():
            target = config
            *parents, last = name.split(".")
            for parent in parents:
                target = getattr(target, parent)
            setattr(target, last, value)
    for new, old in enumerate(kept):
        for module in stack.layers[old].modules():
            for name in _PLACES:
                if module.__dict__.get(name) == old:
                    setattr(module, name, new)
    setattr(stack.owner, stack.name, nn.ModuleList([stack.layers[i] for i in kept]))


def _configs(model: nn.Module) -> list[Any]:
    """The distinct config objects that the model's modules hold."""
    return list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())


@contextmanager
def skipping(model: nn.Module, layers: Iterable[int]) -> Iterator[None]:
    """Within the block, the given layers hand their hidden state on unchanged."""
    stack = find_stack(model)
    with ExitStack() as hooks:
        for layer in layers:
            handle = stack.layers[layer].register_forward_hook(_identity, with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def _identity(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
