"""The MLPs of a model, by the names of its tensors: one row for each form, and what says their width in the config.

An MLP is inputs, which have a row for each neuron, and one output, which has a column for each. Where the inputs are
one tensor, that holds both halves of a gated MLP.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmprune.errors import ModelError
from lmprune.models.checkpoint import TensorEntry, layer_prefix
from lmprune.models.fields import Fields, decoder_fields, layer_count

if TYPE_CHECKING:
    from torch import Tensor, nn

IN, HALVES, OUT = "in", "halves", "out"


@dataclass(frozen=True)
class Form:
    """One way to name an MLP's projections: those that read, whether both halves are one, and the one that writes."""

    inputs: tuple[str, ...]
    output: str
    halves: bool = False


FORMS: tuple[Form, ...] = (
    Form(("gate_proj", "up_proj", "linear_gate"), "down_proj"),
    Form(("gate_up_proj",), "down_proj", halves=True),
    Form(("w1", "w3"), "w2"),
    Form(("input_linear",), "output_linear", halves=True),
    Form(("Wi",), "Wo", halves=True),
    Form(("w_in.w_0", "w_in.w_1"), "w_out"),
    Form(("fc1",), "fc2"),
    Form(("c_fc",), "c_proj"),
    Form(("fc_in",), "fc_out"),
    Form(("dense_h_to_4h",), "dense_4h_to_h"),
    Form(("intermediate.dense",), "output.dense"),
    Form(("intermediate",), "output"),
    Form(("layer_1",), "layer_2"),
    Form(("0",), "2"),
)
EXPERTS_FC = Form(("fc1",), "fc2", halves=True)
"""Aria's experts, whose fc1 holds both halves."""

_PLACES = r"(?:mlp|feed_forward|ffn|ff|mixer|block_sparse_moe|mlp_block|ffn\.ffn|shared_mlp)?"
_SHARED = r"(?:shared_experts?|shared_mlp)"
_PATH = re.compile(rf"(?P<place>{_PLACES})\.?(?:(?P<experts>experts)(?:\.(?P<expert>\d+))?|(?P<shared>{_SHARED}))?")

TRANSPOSED = frozenset({"gpt2", "gpt-sw3", "imagegpt"})
"""Types whose projections are ``Conv1D``: a column for each neuron where others have a row."""
EXPERTS_TRANSPOSED = frozenset({"llama4", "llama4_text", "gpt_oss", "aria_text", "aria"})
"""Likewise of experts that lie in one tensor."""
INTERLEAVED = frozenset({"gpt_oss"})
"""Types whose halves take turns, a row of one after a row of the other."""

NEURON_FIELDS = ("intermediate_size", "decoder_ffn_dim", "ffn_dim", "n_inner", "dff", "d_inner", "dim_ff",
                 "ffn_hidden_size")  # fmt: skip
EXPERT_FIELDS = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
SHARED_FIELDS = ("shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size",
                 "shared_experts_intermediate_size")  # fmt: skip
"""Config fields that say how many neurons: of an MLP, of an expert, of a shared expert that has a field of its own."""
TIMES = {"recurrent_gemma": 2}
"""Types whose field is so many times the number of neurons."""
WITH: dict[str, dict[str, Any]] = {
    "lfm2": {"block_auto_adjust_ff_dim": False},
    "lfm2_vl": {"block_auto_adjust_ff_dim": False},
}
"""What else the config of a type must say for its field to be the number of neurons."""
NO_WIDTH: dict[str, str] = {
    "bitnet": "a norm over all of an MLP's neurons stands between them and its output",
    "gemma3n_text": "which neurons fire is decided among all of a layer's",
    "longcat_flash": "its experts are stored otherwise than they are numbered",
    "gemma3n": "which neurons fire is decided among all of a layer's",
}
"""Types whose MLPs cannot be narrowed, and why."""


@dataclass(frozen=True)
class Source:
    """The uncut model's tensors, wherever they are.

    Attributes:
        config: resolved.
        shapes: of every tensor, by name.
        read: gives one tensor.
        within: layer, and name within the layer, of every tensor of a layer.
    """

    config: Fields
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor] = field(compare=False)
    within: Mapping[str, tuple[int, str]]

    @classmethod
    def stored(cls, config: Fields, tensors: Mapping[str, TensorEntry]) -> Source:
        """That of a checkpoint with the resolved ``config``.

        Raises:
            ModelError: the tensors' names do not tell which are the decoder layers'.
        """
        from lmprune.models.tensors import read_tensor

        layers = layer_count(config)
        prefix = layer_prefix(tensors, layers)
        within = {}
        for name in tensors:
            number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
            if name.startswith(f"{prefix}.") and number.isdecimal() and int(number) < layers:
                within[name] = (int(number), rest)
        shapes = {name: entry.shape for name, entry in tensors.items()}
        return cls(config, shapes, lambda name: read_tensor(tensors[name]), within)

    @classmethod
    def live(cls, model: nn.Module) -> Source:
        """That of a model in memory, also of an empty one."""
        from lmprune.models.stack import find_stack

        tensors, prefix, within = dict(model.named_parameters()), find_stack(model).path, {}
        for name in tensors:
            number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
            if name.startswith(f"{prefix}.") and number.isdecimal():
                within[name] = (int(number), rest)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        config: Any = model.config
        return cls(config.to_dict(), shapes, lambda name: tensors[name].detach(), within)

    @property
    def type(self) -> str:
        """The decoder's model type."""
        return str(decoder_fields(self.config).get("model_type"))


@dataclass(frozen=True)
class Projection:
    """A tensor of an MLP.

    Attributes:
        role: ``in``, ``halves`` or ``out``.
        axis: along which its neurons lie; None for the bias of an output, which has none.
        interleaved: whether the halves take turns.
        expert: which one of its MLP it belongs to, where each has tensors of its own.
    """

    role: str
    axis: int | None
    interleaved: bool = False
    expert: int | None = None


@dataclass(frozen=True)
class Mlp:
    """One MLP of a layer, or all experts of one.

    Attributes:
        layer: the uncut model's number.
        path: of its module within the layer; of experts, that of their list.
        neurons: how many, of each expert where there are some.
        experts: how many there are; None of an MLP that is none.
        shared: whether it is a shared expert.
        tensors: by name.
    """

    layer: int
    path: str
    neurons: int
    experts: int | None
    shared: bool
    tensors: Mapping[str, Projection]


def mlps(source: Source) -> list[Mlp]:
    """All that are known of, in order.

    Raises:
        ModelError: the tensors' names do not tell which are the decoder layers'.
    """
    found: dict[tuple[int, str], dict[str, tuple[Projection, int]]] = {}
    numbers: dict[tuple[int, str], tuple[bool, bool, int]] = {}
    for name, (layer, rest) in source.within.items():
        parsed = _parsed(rest, source, name)
        if parsed is None:
            continue
        path, projection, size, experts, shared = parsed
        found.setdefault((layer, path), {})[name] = (projection, size)
        numbers[layer, path] = (
            experts is not None,
            shared,
            max(experts or 0, numbers.get((layer, path), (0, 0, 0))[2]),
        )
    made = []
    for (layer, path), tensors in sorted(found.items()):
        sizes = {size for projection, size in tensors.values() if projection.axis is not None}
        roles = {projection.role for projection, _ in tensors.values() if projection.axis is not None}
        if OUT not in roles or len(roles) < 2 or len(sizes) != 1:
            continue
        is_experts, shared, experts = numbers[layer, path]
        only = {name: projection for name, (projection, _) in tensors.items()}
        made.append(Mlp(layer, path, sizes.pop(), experts if is_experts else None, shared, only))
    return made


def _parsed(rest: str, source: Source, name: str) -> tuple[str, Projection, int, int | None, bool] | None:
    """Of a tensor of a layer, its MLP's path, what it is in it, neurons, experts so far, and whether it is shared."""
    stem = re.sub(r"\.(weight|bias)$|_bias$", "", rest)
    bias = rest.endswith(("bias",))
    for form in FORMS:
        for leaf in (*form.inputs, form.output):
            if stem != leaf and not stem.endswith(f".{leaf}"):
                continue
            path = stem[: -len(leaf)].rstrip(".")
            place = _PATH.fullmatch(path)
            if place is None or (not path and leaf not in _AT_TOP):
                continue
            expert = int(place["expert"]) if place["expert"] else None
            shape, experts = source.shapes[name], place["experts"] is not None
            stacked = len(shape) == (2 if bias else 3)
            fused = EXPERTS_FC if leaf in ("fc1", "fc2") and stacked else form
            role = OUT if leaf == form.output else HALVES if fused.halves else IN
            axis = _axis(role, bias, stacked, source.type)
            size = 0 if axis is None else shape[axis] // (2 if role == HALVES else 1)
            base = path if expert is None else path.rpartition(".")[0]
            one = Projection(role, axis, source.type in INTERLEAVED and role == HALVES, expert)
            number = (expert + 1 if expert is not None else shape[0]) if experts or stacked else None
            return base, one, size, number, place["shared"] is not None or place["place"] == "shared_mlp"
    return None


_AT_TOP = frozenset({"fc1", "fc2", "intermediate.dense", "output.dense"})
"""Projections that some layers hold themselves, without an MLP around them."""


def _axis(role: str, bias: bool, stacked: bool, kind: str) -> int | None:
    """Along which axis of a projection neurons lie, counted from the end so that experts may stand before."""
    if bias:
        return None if role == OUT else -1
    turned = kind in EXPERTS_TRANSPOSED if stacked else kind in TRANSPOSED
    return -1 if (role == OUT) != turned else -2


def neuron_field(config: Fields, experts: bool) -> str | None:
    """The decoder's config field that says how many neurons an MLP has, or an expert; None where there is none."""
    inner = decoder_fields(config)
    names = EXPERT_FIELDS if experts else NEURON_FIELDS
    return next((name for name in names if name in inner and not isinstance(inner[name], (list, tuple))), None)


def narrowed(source: Source) -> list[Mlp]:
    """The MLPs whose neurons one number of the config counts: experts where there are some, and what goes with them.

    Of a shared expert that the same number sizes, several times over or not, the neurons go as well.

    Raises:
        ModelError: of this architecture none can be narrowed; says why.
    """
    kind = source.type
    if kind in NO_WIDTH:
        raise ModelError(f"{kind}: its MLPs cannot be narrowed: {NO_WIDTH[kind]}. Drop layers instead")
    found = mlps(source)
    if not found:
        raise ModelError(f"{kind}: lmprune knows none of its MLPs by the names of their tensors. Drop layers instead")
    experts = any(mlp.experts is not None for mlp in found)
    name = neuron_field(source.config, experts)
    if name is None:
        raise ModelError(f"{kind}: its config has no field for the width of its MLPs. Drop layers instead")
    inner = decoder_fields(source.config)
    size = max(mlp.neurons for mlp in found if (mlp.experts is not None) == experts and not mlp.shared)
    own = any(isinstance(inner.get(other), int) for other in SHARED_FIELDS)
    dense_too = not experts or (name == "intermediate_size" and "intermediate_size_mlp" not in inner)
    wanted = [
        mlp for mlp in found if mlp.experts is not None or (mlp.shared and not own) or (not mlp.shared and dense_too)
    ]
    for mlp in wanted:
        if mlp.neurons % size if mlp.shared else mlp.neurons != size:
            raise ModelError(
                f"{kind}: layer {mlp.layer} has {mlp.neurons} neurons and others {size}, and lmprune narrows only "
                "MLPs of one width. Drop layers instead"
            )
    twice = [mlp.layer for mlp in wanted if sum((m.layer, m.shared) == (mlp.layer, mlp.shared) for m in wanted) > 1]
    if twice:
        raise ModelError(f"{kind}: layer {twice[0]} has several MLPs, and lmprune narrows one. Drop layers instead")
    if inner.get(name) is not None and inner[name] != size * TIMES.get(kind, 1) and kind not in WITH:
        raise ModelError(f"{kind}: {name} is {inner[name]}, but layers have {size} neurons. Drop layers instead")
    return wanted
