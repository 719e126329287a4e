"""How a `Patch` is carried out: nothing in a config or a checkpoint, a map behind layers of a live model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lmprune.cuts.beside import Beside
from lmprune.cuts.patch import Patch
from lmprune.cuts.plan import Plan
from lmprune.errors import RecipeError, shown
from lmprune.models.mlps import Source

if TYPE_CHECKING:
    from torch import Tensor, nn

CHANGE, DIAGONAL = "change", "diagonal"
"""What the tensors of a file are called, behind the number of their layer."""


def fields(part: Patch, plan: Plan, config: Any) -> Mapping[str, Any]:
    """No config says that there is a patch."""
    return {}


def changes(part: Patch, plan: Plan, source: Source) -> dict[str, Callable[[Tensor], Tensor]]:
    """No tensor holds it."""
    return {}


def live(part: Patch, plan: Plan, model: nn.Module) -> None:
    """Put the maps behind the layers of a live model, which has lost the dropped layers already.

    Raises:
        RecipeError: the file is not the recipe's, or is for another width or other layers.
    """
    from lmprune.models.stack import find_stack, unwrapped

    layers, config = find_stack(model).layers, unwrapped(model).config.get_text_config()
    for layer, found in _changes(part.beside, part.after).items():
        width = getattr(config, "hidden_size", len(found))
        if len(found) != width:
            raise RecipeError(
                f"{part.beside.path} is for states of width {len(found)}, and this model's have {width}. Give the "
                "patch that was made for this model"
            )
        put_behind(layers[plan.kept.index(layer)], found)


def put_behind(layer: nn.Module, change: Tensor) -> None:
    """Have the live ``layer`` hand on x + x ``change`` (width, width) in place of each state x, for good."""
    held = _Held(change)
    layer.forward = _Patched(layer.forward, held.like, held)


def trainable_behind(layer: nn.Module, change: Callable[[], Tensor]) -> None:
    """As `put_behind`, of a map that is asked for at each call; `taken_off` undoes it."""
    layer.forward = _Patched(layer.forward, lambda state: change())


def taken_off(layer: nn.Module) -> None:
    """Undo the last `put_behind` or `trainable_behind`."""
    patched = layer.__dict__.pop("forward")
    if patched.before != layer.forward:
        layer.forward = patched.before


@lru_cache(maxsize=4)
def _changes(beside: Beside, after: tuple[int, ...]) -> dict[int, Tensor]:
    """By layer, what is added of each state. Equal files need not be read again."""
    from lmprune.models.tensors import tensors_beside

    return changes_of(tensors_beside(beside), after, str(beside.path))


def maps_of(model: nn.Module) -> list[list[Tensor]]:
    """Each map that `put_behind` has put behind a layer of a live model: as it was given, then as states need it."""
    found = []
    for module in model.modules():
        patched = module.__dict__.get("forward")
        while isinstance(patched, _Patched):
            if patched.held is not None:
                found.append(patched.held.tensors)
            patched = patched.before
    return found


def changes_of(tensors: Mapping[str, Tensor], after: Sequence[int], where: str) -> dict[int, Tensor]:
    """By layer, what the tensors of a patch's file add of each state: (width, width) in float32.

    Raises:
        RecipeError: they are not the maps behind the layers of ``after``.
    """
    import torch

    from lmprune.models.hadamard import hadamard

    found: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        number, _, what = name.partition(".")
        layer = int(number) if number.isdecimal() and len(number) < 6 else -1
        shape = tensor.dim() == 1 if what == DIAGONAL else tensor.dim() == 2 and len(set(tensor.shape)) == 1
        if layer not in after or layer in found or what not in (CHANGE, DIAGONAL) or not shape or not tensor.numel():
            raise RecipeError(f"{where}: {shown(name)} of shape {list(tensor.shape)} is no map of this patch")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise RecipeError(f"{where}: {shown(name)} holds what is no number")
        if what == DIAGONAL:
            rotation = hadamard(len(tensor)).float()
            tensor = (rotation * (tensor.float().cpu() - 1)) @ rotation.T
        found[layer] = tensor.to(torch.float32)
    if missing := set(after) - set(found):
        raise RecipeError(f"{where} holds no map for layer {min(missing)}, which the recipe promises")
    return found


class _Held:
    """A map in whatever type and on whatever device states come; copies of a model share it, as they share weights."""

    def __init__(self, change: Tensor) -> None:
        self._change, self._made = change, {(change.device, change.dtype): change}

    def __deepcopy__(self, memo: Any) -> _Held:
        return self

    @property
    def tensors(self) -> list[Tensor]:
        """All that it takes memory for; the first is the map as it was given."""
        return list(self._made.values())

    def like(self, state: Tensor) -> Tensor:
        """The map as ``state`` needs it."""
        import torch

        key = state.device, state.dtype
        if key not in self._made:
            with torch.inference_mode(False):  # what is made there could not take part in training afterwards
                self._made[key] = self._change.to(*key)
        return self._made[key]


class _Patched:
    """Stands in a layer's place as its ``forward``: what that gives, with the state mapped."""

    def __init__(self, before: Any, change: Callable[[Tensor], Tensor], held: _Held | None = None) -> None:
        self.before, self._change, self.held = before, change, held

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.before(*args, **kwargs)
        several = isinstance(output, (tuple, list))
        state = output[0] if several else output
        # The state itself is not multiplied: in few bits the map would round it.
        mapped = state + state @ self._change(state)
        return type(output)([mapped, *output[1:]]) if several else mapped
