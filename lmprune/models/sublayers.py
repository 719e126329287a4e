"""How `Sublayers` are carried out: zeros in a checkpoint, nothing computed in a live model.

A sublayer that ends in projections alone adds nothing once these are zero, weight and bias; what follows it (a norm, a
factor) is then given zeros either way. Which projections these are is told by their names, and whether that is all is
tried on the module itself before it is left out: with these projections silent, it must answer with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lmprune.cuts.plan import Plan, spell
from lmprune.cuts.sublayers import PROJECTIONS, Ends, Sublayers
from lmprune.errors import ModelError
from lmprune.models.mlps import FORMS, OUT, Source, mlps

if TYPE_CHECKING:
    from torch import Tensor, nn

MODULES: Mapping[str, tuple[str, ...]] = {
    "attention": ("self_attn", "attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward", "block_sparse_moe", "shared_mlp", "ffn", "ff"),
}
"""Sublayer -> what models call its modules."""
OUTPUTS: Mapping[str, frozenset[str]] = {
    "attention": frozenset({"o_proj", "out_proj", "c_proj", "dense", "wo", "proj", "out"}),
    "mlp": frozenset({*(form.output.rpartition(".")[2] for form in FORMS), "experts", "shared_expert"}),
}
"""Sublayer -> what models call what writes at its end; of experts the module, where each is a tensor and no module."""
AT_TOP = ("fc1", "fc2")
"""The projections of an MLP that some layers hold themselves, without a module around them (OPT)."""
_CACHES = ("past_key_values", "layer_past", "past_key_value")
SAID = {"attention": "attention", "mlp": "MLP"}


def fields(part: Sublayers, plan: Plan, config: Any) -> Mapping[str, Any]:
    """No config says that a sublayer is missing."""
    return {}


def changes(part: Sublayers, plan: Plan, source: Source) -> dict[str, Callable[[Tensor], Tensor]]:
    """Zeros for the projections at the end of each sublayer, their biases too.

    Raises:
        ModelError: a sublayer does not end in projections that are known; naming a layer.
    """
    every = _projections(source)
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for sublayer in PROJECTIONS:
        lack = [layer for layer in getattr(part, sublayer) if layer in plan.kept and (layer, sublayer) not in every]
        if lack:
            raise ModelError(
                f"{source.type}: layer {spell(lack)}: its {SAID[sublayer]} does not end in a projection that lmprune "
                "knows, so it cannot be left out alone. Drop whole layers of this architecture"
            )
        for layer in plan.kept:
            if sublayer in part.of_layer(layer):
                found |= dict.fromkeys(every[layer, sublayer], _zeros)
    if part.ends is not None:
        _require_ends(part, plan, source, every)
    return found


def _require_ends(part: Sublayers, plan: Plan, source: Source, every: Mapping[tuple[int, str], Sequence[str]]) -> None:
    """Refuse a recipe by which mergekit would silence something else."""
    for sublayer, ends in zip(PROJECTIONS, part.ends or ()):
        for layer in plan.kept:
            if sublayer not in part.of_layer(layer):
                continue
            silenced = {n for n, (at, _) in source.within.items() if at == layer and any(end in n for end in ends)}
            if silenced != (wanted := {*every[layer, sublayer]}):
                raise ModelError(
                    f"{source.type}: layer {layer}: what is called {' or '.join(ends)} is not the end of its "
                    f"{SAID[sublayer]}, which is {', '.join(sorted(wanted))}. Write the recipe again with `lmprune "
                    "recipe`"
                )


def with_ends(plan: Plan, sources: Sequence[Source]) -> Plan:
    """``plan`` whose sublayers say what their projections are called, as mergekit must be told.

    Args:
        sources: of the same model; names in a checkpoint may be others than in memory, and mergekit may go by either.

    Raises:
        ModelError: no part of their names tells them from other tensors.
    """
    parts = (_named(part, plan, sources) if isinstance(part, Sublayers) else part for part in plan.parts)
    return replace(plan, parts=tuple(parts))


def _named(part: Sublayers, plan: Plan, sources: Sequence[Source]) -> Sublayers:
    ends: dict[str, dict[str, None]] = {}
    for sublayer, usual in PROJECTIONS.items():
        found = ends.setdefault(sublayer, {})
        gone = {layer for layer in plan.kept if sublayer in part.of_layer(layer)}
        wanted: dict[str, tuple[str, Source]] = {}
        for source in sources:
            for (layer, name), names in _projections(source).items():
                if layer in gone and name == sublayer:
                    wanted |= {tensor: (source.within[tensor][1], source) for tensor in names}
        every = {name for source in sources for name, (layer, _) in source.within.items() if layer in gone}
        for name, (rest, source) in sorted(wanted.items(), key=lambda item: item[0]):
            if not any(end in name for end in found):
                found[_shortest(name, rest, every - wanted.keys(), source)] = None
        if not found:
            found[usual] = None
    made: Ends = (tuple(ends["attention"]), tuple(ends["mlp"]))
    return replace(part, ends=made)


def _shortest(name: str, rest: str, others: Iterable[str], source: Source) -> str:
    """The shortest end of a tensor's name within its layer that none of ``others`` holds."""
    stem = rest.removesuffix(".weight").removesuffix(".bias").removesuffix("_bias").split(".")
    ends = (".".join(stem[-count:]) for count in range(1, len(stem) + 1))
    end = next((end for end in ends if not any(end in other for other in others)), None)
    if end is None:
        raise ModelError(f"{source.type}: no part of the name tells {name} from other tensors. Drop whole layers")
    return end


def _projections(source: Source) -> dict[tuple[int, str], list[str]]:
    """(layer, sublayer) -> the tensors at its end, by their names in the checkpoint."""
    found: dict[tuple[int, str], list[str]] = {}
    for name, (layer, rest) in source.within.items():
        path = rest.split(".")
        if path[0] in MODULES["attention"] and len(path) > 2 and path[-2] in OUTPUTS["attention"]:
            found.setdefault((layer, "attention"), []).append(name)
    for mlp in mlps(source):
        ends = [name for name, projection in mlp.tensors.items() if projection.role == OUT]
        found.setdefault((mlp.layer, "mlp"), []).extend(ends)
    return found


def _zeros(tensor: Tensor) -> Tensor:
    return tensor * 0


def live(part: Sublayers, plan: Plan, model: nn.Module) -> None:
    """Have the sublayers of a live model, which has lost the dropped layers already, compute nothing.

    Raises:
        ModelError: they are not found.
    """
    from lmprune.models.stack import find_stack

    layers = find_stack(model).layers
    for place, layer in enumerate(plan.kept):
        for sublayer in part.of_layer(layer):
            within: Any = layers[place]
            if modules := _modules(within, sublayer):
                for module in modules:
                    module.forward = _Skip(module, sublayer, layer)
            elif sublayer == "mlp" and all(hasattr(within, name) for name in AT_TOP):
                first, last = (getattr(within, name) for name in AT_TOP)
                first.forward, last.forward = _nothing(1), _nothing(last.out_features)
            else:
                raise ModelError(
                    f"layer {layer} has no module called {' or '.join(MODULES[sublayer])}, so its {SAID[sublayer]} "
                    "cannot be left out alone. Drop whole layers of this architecture"
                )


def _modules(layer: Any, sublayer: str) -> list[Any]:
    """Those of a layer that are its attention or MLP: experts may stand beside an MLP, and LongCat attends twice."""
    from torch import nn

    found = [getattr(layer, name) for name in MODULES[sublayer] if getattr(layer, name, None) is not None]
    return [each for module in found for each in (module if isinstance(module, nn.ModuleList) else [module])]


def _nothing(width: int) -> Callable[[Tensor], Tensor]:
    """Stands in a linear map's place: zeros of so many numbers a token."""
    return lambda hidden: hidden.new_zeros(*hidden.shape[:-1], width)


class _Skip:
    """Stands in a module's place as its ``forward``: zeros, in the form in which the module answers.

    The module itself runs once, at the first call, which tells that form, and whether it adds nothing once its
    projections do not. Of what a cache holds for the layer only the length is kept, by which models count positions.
    """

    def __init__(self, module: Any, sublayer: str, layer: int) -> None:
        self._module, self._sublayer, self._layer, self._more = module, sublayer, layer, -1
        self._form: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        cache = next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)
        if self._more < 0:
            answer = self._silenced(*args, **(kwargs | {name: None for name in _CACHES if name in kwargs}))
            self._form = type(answer) if isinstance(answer, (tuple, list)) else None
            self._more = len(answer) - 1 if self._form else 0
        if cache is not None and getattr(self._module, "layer_idx", None) is not None:
            nothing = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
            cache.update(nothing, nothing, self._module.layer_idx)
        zeros = hidden.new_zeros(hidden.shape)
        return self._form((zeros, *[None] * self._more)) if self._form else zeros

    def _silenced(self, *args: Any, **kwargs: Any) -> Any:
        """What the module answers while the projections at its end write zeros."""

        def silent(module: nn.Module, given: Any, output: Any) -> Any:
            return tuple(x * 0 for x in output) if isinstance(output, tuple) else output * 0

        ends = OUTPUTS[self._sublayer]
        with ExitStack() as undo:
            for name, part in self._module.named_modules():
                if name.rpartition(".")[2] not in ends:
                    continue
                held = {key: tensor for key, tensor in part._parameters.items() if key.removesuffix("_bias") in ends}
                if any(_plain(held.get(end)) for end in ends):
                    # Experts that are a tensor; what else the module adds (LongCat's identities) must be seen.
                    zeros = {key: tensor.new_zeros(tensor.shape) for key, tensor in held.items() if tensor is not None}
                    undo.callback(part._parameters.update, held)
                    part._parameters.update(zeros)
                else:
                    undo.callback(part.register_forward_hook(silent).remove)
            answer = type(self._module).forward(self._module, *args, **kwargs)
        parts = answer if isinstance(answer, (tuple, list)) else (answer,)
        if bool(parts[0].any()):
            raise ModelError(
                f"layer {self._layer}: its {SAID[self._sublayer]} ({type(self._module).__name__}) adds more than its "
                "last projection writes, so it cannot be left out alone. Drop whole layers of this architecture"
            )
        if any(_chosen(part) for part in parts[1:]):
            raise ModelError(
                f"layer {self._layer}: its {SAID[self._sublayer]} ({type(self._module).__name__}) chooses tokens for "
                "other layers too, so it cannot be left out alone. Drop whole layers of this architecture"
            )
        return answer


def _plain(weight: Tensor | None) -> bool:
    """Whether a weight is there, neither elsewhere nor in few bits."""
    return weight is not None and weight.is_floating_point() and weight.itemsize > 1 and not weight.is_meta


def _chosen(part: Any) -> bool:
    """Whether a part of an answer is indices, which a later layer may go by (DeepSeek's sparse attention)."""
    return hasattr(part, "is_floating_point") and not part.is_floating_point()
