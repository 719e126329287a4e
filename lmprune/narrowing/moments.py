"""Second moments of what passes through a live model: of what enters its maps, and of the stream that its norms read.

A Gram matrix takes m^2 numbers and a layer's are used up before the next is asked for. As many layers as fit are
gathered in one pass, so that a small model is read once, and a large one a few times, each time as far as need be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lmprune.forward.batches import Batch
from lmprune.forward.calls import decoder_of, entering_any, evaluating, run_decoder
from lmprune.models.stack import find_stack

HELD_BYTES = 1 << 30
"""Gram matrices that are gathered together, at most, unless one alone is larger."""


class _Enough(Exception):
    """Ends a pass."""


@torch.no_grad()
def grams(
    model: nn.Module, batches: Sequence[Batch], places: Sequence[Mapping[str, nn.Module]], *, held: int = HELD_BYTES
) -> Iterator[dict[str, Tensor]]:
    """Layer by layer, for each of its modules in ``places`` g'g of what enters it: (m, m) in float64 on the CPU.

    Args:
        batches: on the model's device.
        places: for each layer the modules by name, maps of a weight (d_out, m) or (m, d_out).
        held: bytes of matrices that are gathered in one pass.
    """
    sizes = [sum(8 * _inputs(module) ** 2 for module in modules.values()) for modules in places]
    at = 0
    while at < len(places):
        stop = at + 1
        while stop < len(places) and sum(sizes[at : stop + 1]) <= held:
            stop += 1
        found: list[dict[str, Tensor]] = [{} for _ in places[at:stop]]
        takes = [
            (module, partial(_add_gram, into, name))
            for into, modules in zip(found, places[at:stop])
            for name, module in modules.items()
        ]
        _pass(model, batches, takes, stop)
        yield from found
        at = stop


@torch.no_grad()
def stream(model: nn.Module, batches: Sequence[Batch], norms: Sequence[nn.Module]) -> list[Tensor]:
    """For each norm the mean of x x' of what enters it, (d, d), each x of mean square 1; in float64 on the CPU."""
    found: list[dict[str, Tensor]] = [{} for _ in norms]
    _pass(model, batches, [(norm, partial(_add_unit, into)) for norm, into in zip(norms, found)], None)
    tokens = sum(int(batch.lengths.sum()) for batch in batches)
    return [into["gram"] / tokens for into in found]


def _pass(
    model: nn.Module, batches: Sequence[Batch], takes: Sequence[tuple[nn.Module, Callable[..., None]]], stop: int | None
) -> None:
    """Run all batches through the decoder, up to layer ``stop``; ``takes`` get what enters their modules."""
    layers, decoder = find_stack(model).layers, decoder_of(model)

    def end(_: Any) -> None:
        raise _Enough

    with evaluating(model):
        for batch in batches:
            with ExitStack() as hooks:
                hooks.enter_context(suppress(_Enough))
                for module, take in takes:
                    hooks.enter_context(entering_any(module, partial(take, batch)))
                if stop is not None and stop < len(layers):
                    hooks.enter_context(entering_any(layers[stop], end))
                run_decoder(decoder, batch)


def _add_gram(into: dict[str, Tensor], name: str, batch: Batch, entered: Tensor) -> None:
    real = batch.real(entered).float()
    # A batch's products in float32, their sum over batches in float64.
    product = (real.T @ real).to("cpu", torch.float64)
    into[name] = into[name].add_(product) if name in into else product


def _add_unit(into: dict[str, Tensor], batch: Batch, entered: Tensor) -> None:
    real = batch.real(entered).float()
    size = real.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    _add_gram(into, "gram", Batch(batch.ids, batch.lengths, None), real / size)


def _inputs(module: Any) -> int:
    """How wide what enters a map is."""
    return int(module.in_features if hasattr(module, "in_features") else module.weight.shape[0])
