"""The orders of a live model's neurons and groups, and the directions of its stream, from calibration text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from lmprune.errors import ModelError
from lmprune.forward.batches import Batch
from lmprune.forward.experts import are_experts
from lmprune.models.mlps import HALVES, OUT, Mlp, narrowed
from lmprune.models.stack import find_stack
from lmprune.models.width import Slicing, live_source
from lmprune.narrowing.base import Inner, Method, Order, Rotation
from lmprune.narrowing.methods import slice as slicing
from lmprune.narrowing.moments import Place, grams, places_of, stream

RARE = 1e-3
"""Of the mean diagonal of a layer's experts, what is added to each one's."""


@dataclass(frozen=True)
class Neurons:
    """In which order the neurons of an MLP go, or those of each of its experts.

    Attributes:
        layer: whose it is.
        name: what the width's file calls it.
        orders: one, or one for each expert.
        experts: whether they are experts.
    """

    layer: int
    name: str
    orders: tuple[Order, ...]
    experts: bool

    def kept(self, share: Fraction) -> Tensor:
        """The neurons that are left of such a share of them, (neurons,) or (experts, neurons), in int32."""
        rows = [order.kept(int(len(order.units) * share)).to(torch.int32) for order in self.orders]
        return torch.stack(rows) if self.experts else rows[0]


def neuron_orders(model: Any, batches: Sequence[Batch], method: Method) -> Iterator[Neurons]:
    """For each MLP the order of its neurons.

    An expert that few tokens go to, or none, is held to its weights: to its Gram matrix comes the identity, by `RARE`
    of what those of its layer have on their diagonals on average.

    Raises:
        ModelError: this architecture's MLPs cannot be narrowed, or not found in the live model.
    """
    found = narrowed(live_source(model))
    places = [places_of(mlp.layer, *_end_of(model, mlp)) for mlp in found]
    matrices = grams(model, batches, [place for those in places for place in those])
    for mlp, those in zip(found, places):
        weights, orders, diagonals = _weights_of(model, mlp), list[Order](), list[float]()
        for _ in those:
            gathered = next(matrices)
            gram = gathered.gram if mlp.experts is not None else gathered.gram[None]
            if mlp.experts is not None:
                own = gram.diagonal(dim1=1, dim2=2)
                diagonals += own.mean(1).tolist()
                own.add_(RARE * (sum(diagonals) / len(diagonals) or 1.0))
            for one, tokens, (writer, *readers) in zip(gram, gathered.tokens, weights):
                orders.append(method.order(Inner(one, writer, tuple(readers), mlp.neurons, tokens)))
            del gathered, gram  # before the next is gathered
        name = f"{'shared' if mlp.shared else 'neurons'}.{mlp.layer}"
        yield Neurons(mlp.layer, name, tuple(orders), mlp.experts is not None)


def check_neurons(model: Any, batch: Batch) -> None:
    """Refuse a model whose neurons cannot be ordered, by one pass.

    Raises:
        ModelError: as `neuron_orders`.
    """
    found = narrowed(live_source(model))
    ends = [(mlp.layer, _end_of(model, mlp)) for mlp in found if mlp.experts is not None]
    list(grams(model, [batch], [Place(layer, module, width, range(0)) for layer, (module, width, _) in ends]))


def _end_of(model: Any, mlp: Mlp) -> tuple[nn.Module, int, int | None]:
    """The map at an MLP's end, how wide what enters it is, and how many experts it is the end of.

    Raises:
        ModelError: its experts are modules of their own, or no module that we know.
    """
    ends = [name for name, part in mlp.tensors.items() if part.role == OUT and part.axis is not None]
    if mlp.experts is None:
        return model.get_submodule(ends[0].removesuffix(".weight")), mlp.neurons, None
    module = model.get_submodule(ends[0].rpartition(".")[0])
    if not are_experts(module):
        raise ModelError(
            f"layer {mlp.layer}: its experts are a {type(module).__name__}, of which lmprune does not know what enters "
            "their last maps, so that their neurons cannot be chosen. Use --with depth"
        )
    return module, mlp.neurons, mlp.experts


def _weights_of(model: Any, mlp: Mlp) -> Iterator[list[Tensor]]:
    """Of each expert, or of the one MLP, the weight of the map that writes, (neurons, d_out), and of those that read.

    The latter are (neurons, d_in).
    """
    for expert in range(mlp.experts or 1):
        writer: list[Tensor] = []
        readers: list[Tensor] = []
        for name, projection in mlp.tensors.items():
            if projection.axis is None or name.endswith("bias"):
                continue
            weight = model.get_parameter(name).detach()
            weight = (weight if mlp.experts is None else weight[expert]).float().cpu()
            weight = weight if projection.axis == -2 else weight.T
            if projection.role == OUT:
                writer.append(weight)
            elif projection.role == HALVES:
                readers += [weight[0::2], weight[1::2]] if projection.interleaved else list(weight.chunk(2))
            else:
                readers.append(weight)
        yield [*writer, *readers]


def group_orders(model: Any, batches: Sequence[Batch], method: Method, groups: int) -> Iterator[Order]:
    """For each layer the order of its key-value groups.

    Raises:
        ModelError: an attention does not end in an ``o_proj``.
    """
    layers = list(find_stack(model).layers)
    ends = [_output_of(layer) for layer in layers]
    weights: list[Any] = [end.weight for end in ends]
    places = [Place(layer, end, weight.shape[1]) for layer, (end, weight) in enumerate(zip(ends, weights))]
    for weight, found in zip(weights, grams(model, batches, places)):
        yield method.order(Inner(found.gram, weight.detach().float().cpu().T, (), groups, found.tokens[0]))


def _output_of(layer: nn.Module) -> nn.Module:
    found = [module for path, module in layer.named_modules() if path.endswith("self_attn.o_proj")]
    if len(found) != 1:
        raise ModelError("an attention does not end in an o_proj, so its groups cannot be chosen. Leave groups out")
    return found[0]


def directions(model: Any, batches: Sequence[Batch]) -> Rotation:
    """The principal directions of a model's stream.

    Raises:
        ModelError: its hidden size cannot be cut.
    """
    layers = find_stack(model).layers
    source = live_source(model)
    maps = Slicing(torch.empty(0), source)
    norms = [model.get_submodule(f"{find_stack(model).path}.{place}.{name}") for place in range(len(layers))
             for name in ("input_layernorm", "post_attention_layernorm")]  # fmt: skip
    norms.append(model.get_submodule(maps.final.removesuffix(".weight")))
    every, last = stream(model, batches, norms)
    return slicing.rotation(every, last, maps.stream)
