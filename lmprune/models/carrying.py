"""How a plan is carried out: on a config, on the names of tensors, on tensors, and on a live model.

Whole layers are carried out here. What other kinds of plan do stands in `CARRIERS`, one line each; wherever a plan is
met (loading, copying, proving, views), it is through these functions, so that a kind opens none of those places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmprune.cuts.plan import Part, Plan, is_stock
from lmprune.errors import ModelError, UsageError, shown
from lmprune.models import compensation, patches, sublayers, width
from lmprune.models.checkpoint import is_number, layer_prefix, renamed
from lmprune.models.fields import Fields, apply_fields, changed_fields, layer_count
from lmprune.models.mlps import Source

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmprune.models.checkpoint import TensorEntry

Change = Callable[["Tensor"], "Tensor"]
"""From a tensor of the checkpoint to what the cut model holds in its place."""


@dataclass(frozen=True)
class Carrier:
    """How one kind of part is carried out. Each function is given the part and its whole plan.

    Attributes:
        fields: the dotted config fields that it changes, from the resolved config without the dropped layers.
        changes: by name in the uncut checkpoint, what becomes of each tensor that does not stay as it is; refuses a
            checkpoint that the part cannot be cut from.
        live: does the same to a live model, which has lost the dropped layers already.
        loaded: what is left to do to a live model whose tensors were changed while they were read; None: nothing.
    """

    fields: Callable[[Any, Plan, Fields], Mapping[str, Any]]
    changes: Callable[[Any, Plan, Source], Mapping[str, Change]]
    live: Callable[[Any, Plan, nn.Module], None]
    loaded: Callable[[Any, Plan, nn.Module], None] | None = None


CARRIERS: dict[str, Carrier] = {
    "compensation": Carrier(compensation.fields, compensation.changes, compensation.live),
    "patch": Carrier(patches.fields, patches.changes, patches.live, patches.live),
    "sublayers": Carrier(sublayers.fields, sublayers.changes, sublayers.live, sublayers.live),
    "width": Carrier(width.fields, width.changes, width.live),
}


def cut_fields(config: Fields, plan: Plan) -> dict[str, Any]:
    """Dotted field -> new value for every field of a resolved config that ``plan`` changes.

    Raises:
        ModelError: no config can describe what is left; names the reason and, of layers, the nearest that would do.
    """
    changes = changed_fields(config, plan.kept)
    for part in plan.parts:
        changes |= _carrier(part).fields(part, plan, apply_fields(config, changes))
    return changes


def cut_config(config: Fields, plan: Plan | None) -> dict[str, Any]:
    """The resolved config of what ``plan`` leaves of the model with that resolved config; errors as `cut_fields`."""
    return apply_fields(config, cut_fields(config, plan) if plan is not None else {})


def cut_names(names: Iterable[str], plan: Plan | None) -> dict[str, str]:
    """Old name -> new name of every tensor that is left.

    Raises:
        ModelError: the names do not tell which tensors are the decoder layers'.
    """
    names = list(names)
    if plan is None:
        return {name: name for name in names}
    return renamed(names, layer_prefix(names, plan.layers), plan.kept, plan.layers)


def check_depth(names: Iterable[str], config: Fields) -> None:
    """Refuse weights of more layers than the resolved config says: somebody lowered its count by hand.

    Raises:
        ModelError: naming both counts. Layers behind the last that predict further tokens are none.
    """
    layers = layer_count(config)
    try:
        prefix = layer_prefix(names, layers)
    except ModelError:
        return  # told better by whoever needs the layers
    inner = config.get("text_config") if isinstance(config.get("text_config"), Mapping) else config
    behind = inner.get("num_nextn_predict_layers") or 0 if isinstance(inner, Mapping) else 0
    found = {rest: name for name in names if (rest := _number_after(name, prefix)) is not None}
    if odd := sorted(rest for rest in found if not is_number(rest)):
        raise ModelError(f"the tensor {shown(found[odd[0]])} is of no layer that this model has. Download it again")
    numbers = set(map(int, found))
    if max(numbers, default=0) >= layers + behind:
        raise ModelError(
            f"the config promises {layers} layers, but the weights are of {max(numbers) + 1}. Mend config.json: layers "
            "are dropped with `lmprune recipe`"
        )


def _number_after(name: str, prefix: str) -> str | None:
    if not name.startswith(f"{prefix}."):
        return None
    number = name[len(prefix) + 1 :].partition(".")[0]
    return None if any(letter.isascii() and letter.isalpha() for letter in number) else number


def tensor_changes(tensors: Mapping[str, TensorEntry], plan: Plan | None, config: Fields) -> dict[str, Change]:
    """By its name in the uncut checkpoint with the resolved ``config``, what becomes of each tensor left that changes.

    Raises:
        ModelError: a part cannot be cut from this checkpoint.
        RecipeError: a part's file does not fit it.
    """
    if plan is None or not plan.parts:
        return {}
    left = cut_names(tensors, plan)
    return {name: change for name, change in changes_of(plan, Source.stored(config, tensors)).items() if name in left}


def changes_of(plan: Plan, source: Source) -> dict[str, Change]:
    """By its name in ``source``, what becomes of each tensor that changes; errors as `tensor_changes`."""
    changes: dict[str, Change] = {}
    for part in plan.parts:
        found = _carrier(part).changes(part, plan, source)
        for name in found:
            changes[name] = _both(changes[name], found[name]) if name in changes else found[name]
    return changes


def cut_live(model: nn.Module, plan: Plan) -> None:
    """Cut a live model in place and for good; errors as `cut_fields`, and then the model is as it was."""
    from lmprune.models.stack import drop_layers

    carriers = [(part, _carrier(part)) for part in plan.parts]
    drop_layers(model, plan)
    for part, carrier in carriers:
        carrier.live(part, plan, model)


def finish_live(model: nn.Module, plan: Plan | None) -> None:
    """Do to a model what reading changed tensors alone does not do."""
    for part in plan.parts if plan is not None else ():
        loaded = _carrier(part).loaded
        if loaded is not None and plan is not None:
            loaded(part, plan, model)


def require_stock(plan: Plan | None, name: str) -> None:
    """Refuse to write as a stock checkpoint what no such can hold.

    Raises:
        UsageError: naming the part; ``name`` is what the user calls the cut.
    """
    for part in plan.parts if plan is not None else ():
        if not is_stock(part):
            raise UsageError(
                f"{name} comes with {part.describe()}, which no stock checkpoint can hold. Repair the cut without it "
                "by `lmprune heal RECIPE OUT --method refit`"
            )


def _carrier(part: Part) -> Carrier:
    if part.kind not in CARRIERS:
        raise ModelError(f"a cut of the kind {part.kind!r} cannot be carried out by this lmprune. Use a newer one")
    return CARRIERS[part.kind]


def _both(first: Change, then: Change) -> Change:
    return lambda tensor: then(first(tensor))
