"""The orders of a live model's neurons and groups, and the directions of its stream, from calibration text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmprune.errors import ModelError
from lmprune.forward.batches import Batch
from lmprune.models.mlps import HALVES, OUT, Mlp, narrowed
from lmprune.models.stack import find_stack
from lmprune.models.width import Slicing, live_source
from lmprune.narrowing.base import Inner, Method, Order, Rotation
from lmprune.narrowing.methods import slice as slicing
from lmprune.narrowing.moments import grams, stream


def neuron_orders(model: Any, batches: Sequence[Batch], method: Method) -> Iterator[tuple[int, str, list[Order]]]:
    """For each MLP its layer, what the width's file calls it, and its order; an order for each of its experts.

    Raises:
        ModelError: this architecture's MLPs cannot be narrowed, or not found in the live model.
    """
    source = live_source(model)
    found = narrowed(source)
    layers: list[dict[str, nn.Module]] = [{} for _ in find_stack(model).layers]
    for mlp in found:
        if mlp.experts is not None:
            raise ModelError(f"{source.type}: the neurons of experts are not chosen yet. Use --with depth")
        layers[mlp.layer][mlp.path] = model.get_submodule(_writer_of(mlp))
    tokens = sum(int(batch.lengths.sum()) for batch in batches)
    for layer, matrices in enumerate(grams(model, batches, layers)):
        for mlp in (mlp for mlp in found if mlp.layer == layer):
            writer, *readers = _weights_of(model, mlp)
            inner = Inner(matrices[mlp.path], writer, tuple(readers), mlp.neurons, tokens)
            yield layer, f"{'shared' if mlp.shared else 'neurons'}.{layer}", [method.order(inner)]


def _writer_of(mlp: Mlp) -> str:
    """The path in the model of the map at an MLP's end."""
    return next(
        name.removesuffix(".weight")
        for name, projection in mlp.tensors.items()
        if projection.role == OUT and projection.axis is not None
    )


def _weights_of(model: Any, mlp: Mlp) -> list[Tensor]:
    """The weight of the map that writes, (neurons, d_out), then those of the maps that read, (neurons, d_in)."""
    writer: list[Tensor] = []
    readers: list[Tensor] = []
    for name, projection in mlp.tensors.items():
        weight = model.get_parameter(name).detach().float().cpu()
        if projection.axis is None or weight.dim() != 2:
            continue
        weight = weight if projection.axis == -2 else weight.T
        if projection.role == OUT:
            writer.append(weight)
        elif projection.role == HALVES:
            readers += [weight[0::2], weight[1::2]] if projection.interleaved else list(weight.chunk(2))
        else:
            readers.append(weight)
    return [*writer, *readers]


def group_orders(model: Any, batches: Sequence[Batch], method: Method, groups: int) -> Iterator[Order]:
    """For each layer the order of its key-value groups.

    Raises:
        ModelError: an attention does not end in an ``o_proj``.
    """
    layers = list(find_stack(model).layers)
    ends = [_output_of(layer) for layer in layers]
    tokens = sum(int(batch.lengths.sum()) for batch in batches)
    for end, matrices in zip(ends, grams(model, batches, [{"heads": end} for end in ends])):
        weight: Any = end.weight
        yield method.order(Inner(matrices["heads"], weight.detach().float().cpu().T, (), groups, tokens))


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
