"""The orders of a live model's neurons and groups, and the directions of its stream, from calibration text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
"""Of the mean diagonal of several experts, what is added to each one's."""


def neuron_orders(model: Any, batches: Sequence[Batch], method: Method) -> Iterator[tuple[int, str, list[Order]]]:
    """For each MLP its layer, what the width's file calls it, and its order; an order for each of its experts.

    An expert that few tokens go to, or none, is held to its weights: to its Gram matrix comes the identity, by `RARE`
    of what the experts that are gathered with it have on their diagonals on average.

    Raises:
        ModelError: this architecture's MLPs cannot be narrowed, or not found in the live model.
    """
    found = narrowed(live_source(model))
    places = [places_of(mlp.layer, *_end_of(model, mlp)) for mlp in found]
    tokens = sum(int(batch.lengths.sum()) for batch in batches)
    matrices = grams(model, batches, [place for those in places for place in those])
    for mlp, those in zip(found, places):
        weights, orders = _weights_of(model, mlp), list[Order]()
        for _ in those:
            gathered = next(matrices)
            if mlp.experts is not None:
                diagonals = gathered.diagonal(dim1=1, dim2=2)
                diagonals.add_(RARE * diagonals.mean())
            for gram, (writer, *readers) in zip(gathered if mlp.experts is not None else [gathered], weights):
                orders.append(method.order(Inner(gram, writer, tuple(readers), mlp.neurons, tokens)))
        yield mlp.layer, f"{'shared' if mlp.shared else 'neurons'}.{mlp.layer}", orders


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
    tokens = sum(int(batch.lengths.sum()) for batch in batches)
    weights: list[Any] = [end.weight for end in ends]
    places = [Place(layer, end, weight.shape[1]) for layer, (end, weight) in enumerate(zip(ends, weights))]
    for weight, gram in zip(weights, grams(model, batches, places)):
        yield method.order(Inner(gram, weight.detach().float().cpu().T, (), groups, tokens))


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
    return slicing.rotation(stream(model, batches, norms), maps.stream)
