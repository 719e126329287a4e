"""How `Sublayers` are carried out: zeros in a checkpoint, nothing computed in a live model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lmprune.cuts.plan import Plan, spell
from lmprune.cuts.sublayers import PROJECTIONS, Sublayers
from lmprune.errors import ModelError
from lmprune.models.mlps import Source

if TYPE_CHECKING:
    from torch import Tensor, nn

MODULES: Mapping[str, tuple[str, ...]] = {"attention": ("self_attn", "attn"), "mlp": ("mlp", "feed_forward")}
"""Sublayer -> what models call its module."""
_IN_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")


def fields(part: Sublayers, plan: Plan, config: Any) -> Mapping[str, Any]:
    """No config says that a sublayer is missing."""
    return {}


def changes(part: Sublayers, plan: Plan, source: Source) -> dict[str, Callable[[Tensor], Tensor]]:
    """Zeros for the projection at the end of each sublayer, its bias too.

    Raises:
        ModelError: a sublayer does not end in a projection of the known names; naming a layer.
    """
    left = {name: set(getattr(part, name)) for name in PROJECTIONS}
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for name in source.shapes:
        place = _IN_LAYER.search(name)
        for sublayer, projection in PROJECTIONS.items() if place is not None else ():
            if place is None or projection not in place[2]:
                continue
            layer = int(place[1])
            left[sublayer].discard(layer)
            if layer not in plan.dropped and sublayer in part.of_layer(layer):
                found[name] = _zeros
    for sublayer, layers in left.items():
        if layers:
            raise ModelError(
                f"layer {spell(sorted(layers))}: its {sublayer} does not end in a {PROJECTIONS[sublayer]}, so lmprune "
                "cannot leave it out alone. Drop whole layers of this architecture"
            )
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
            names = [name for name in MODULES[sublayer] if hasattr(layers[place], name)]
            if not names:
                raise ModelError(f"layer {layer} has no module called {' or '.join(MODULES[sublayer])}")
            module: Any = getattr(layers[place], names[0])
            module.forward = _Skip(module)


class _Skip:
    """Stands in a module's place as its ``forward``: zeros, in the form in which the module answers.

    The module itself runs once, at the first call, which tells that form. Of what a cache holds for the layer only the
    length is kept, by which models count their positions.
    """

    def __init__(self, module: Any) -> None:
        self._module, self._more = module, -1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values")
        if self._more < 0:
            plain = kwargs | ({"past_key_values": None} if cache is not None else {})
            answer = type(self._module).forward(self._module, *args, **plain)
            self._more = len(answer) - 1 if isinstance(answer, tuple) else 0
            self._tuple = isinstance(answer, tuple)
        if cache is not None and getattr(self._module, "layer_idx", None) is not None:
            nothing = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
            cache.update(nothing, nothing, self._module.layer_idx)
        zeros = hidden.new_zeros(hidden.shape)
        return (zeros, *[None] * self._more) if self._tuple else zeros
