"""The decoder stack of a live model: find it, and drop layers for good."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lmprune.cuts.plan import Plan
from lmprune.errors import ModelError
from lmprune.models.checkpoint import decoders
from lmprune.models.fields import changed_fields, layer_count

_PLACES = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")
"""The names under which a layer or its parts remember their place in the stack."""


@dataclass(frozen=True)
class Stack:
    """Where a model keeps its decoder layers: ``owner.name`` is ``layers``, at the dotted ``path``."""

    path: str
    layers: nn.ModuleList
    owner: nn.Module
    name: str


def unwrapped(model: nn.Module) -> Any:
    """The model itself, without an adapter around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_stack(model: nn.Module) -> Stack:
    """The list of decoder layers of ``model``; the path is that within the model that an adapter wraps.

    Raises:
        ModelError: no list of modules, or more than one, has as many entries as the config promises layers.
    """
    model = unwrapped(model)
    count = layer_count(model.config.to_dict())
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    outer = {path for path in lists if not any(path.startswith(f"{other}.") for other in lists)}
    paths = decoders(outer)
    if len(paths) != 1:
        problem = f"several lists of that length: {', '.join(sorted(outer))}" if outer else "no list has that many"
        raise ModelError(
            f"{model.config.model_type}: cannot tell which modules are the {count} decoder layers: {problem}"
        )
    parent, _, name = paths[0].rpartition(".")
    return Stack(paths[0], lists[paths[0]], model.get_submodule(parent), name)


def drop_layers(model: nn.Module, plan: Plan) -> None:
    """Remove the dropped layers in place and for good: modules, configs, and what layers remember of their place.

    Raises:
        ModelError: the model's config cannot describe what would be left; the model is as it was.
    """
    inner = unwrapped(model)
    changes = [(config, changed_fields(config.to_dict(), plan.kept)) for config in decoder_configs(inner)]
    stack = find_stack(model)
    within = {id(part) for layer in stack.layers for part in layer.modules()}
    outside = [module for module in inner.modules() if id(module) not in within]
    for config, fields in changes:
        for name, value in fields.items():
            _retell(outside, name, getattr(config, name, None), value)
            set_field(config, name, value)
    place = {old: new for new, old in enumerate(plan.kept)}
    for old, new in place.items():
        for module in stack.layers[old].modules():
            _move(module, old, new)
            if isinstance(numbered := module.__dict__.get("layer_dic"), dict):  # Zamba 2: layer -> adapter
                module.layer_dic = {place[layer]: adapter for layer, adapter in numbered.items() if layer in place}
    setattr(stack.owner, stack.name, nn.ModuleList([stack.layers[old] for old in plan.kept]))
    # A static cache of an earlier generation has one entry per old layer.
    inner.__dict__.pop("_cache", None)


def decoder_configs(model: Any) -> list[Any]:
    """The distinct config objects that describe the decoder: the model's own first, then copies held by modules."""
    wanted = model.config.get_text_config(decoder=True).model_type
    found: dict[int, Any] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        parts: tuple[Any, ...] = (config, getattr(config, "text_config", None))
        for part in parts:
            if hasattr(part, "to_dict") and part.model_type == wanted:
                found.setdefault(id(part), part)
    return list(found.values())


def set_field(config: Any, name: str, value: Any) -> None:
    """Set a possibly dotted field; the parts before the last may be objects or dictionaries."""
    *parents, last = name.split(".")
    for parent in parents:
        config = getattr(config, parent)
    if isinstance(config, dict):
        config[last] = value
    else:
        setattr(config, last, value)


def _retell(modules: Iterable[nn.Module], name: str, old: Any, new: Any) -> None:
    """Give ``new`` to every module that keeps its own copy of the config's field ``name``."""
    for module in modules:
        if name in module.__dict__ and module.__dict__[name] == old:
            setattr(module, name, new)


def _move(module: nn.Module, old: int, new: int) -> None:
    """Tell one part of layer ``old`` that it now stands at ``new``."""
    for name in _PLACES:
        remembered = module.__dict__.get(name)
        if remembered == old:
            setattr(module, name, new)
        elif isinstance(remembered, int) and remembered // 2 == old and name == "layer_idx":
            setattr(module, name, 2 * new + remembered % 2)  # LongCat: two attentions in one layer
