"""Second moments of what passes through a live model: of what enters its maps, and of the stream that its norms read.

A Gram matrix takes m^2 numbers and is used up before the next ones are asked for. As many as fit are gathered in one
pass, so that a small model is read once, and a large one a few times, each time as far as need be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lmprune.errors import ModelError
from lmprune.forward.batches import Batch
from lmprune.forward.calls import calling, decoder_of, entering_any, evaluating, run_decoder
from lmprune.forward.experts import Experts, called_with, known_experts
from lmprune.forward.machine import free_memory
from lmprune.models.stack import find_stack

HELD_BYTES = 1 << 30
"""Gram matrices that are gathered together, at most, unless one alone is larger."""


class _Enough(Exception):
    """Ends a pass."""


@dataclass(frozen=True)
class Place:
    """Where a Gram matrix is gathered, or one for each of some experts.

    Attributes:
        layer: whose it is.
        module: a map of a weight (d_out, m) or (m, d_out), or a module of fused experts.
        width: how wide what enters it is, m; of experts, what enters the last map of each.
        experts: which of a module of experts; None of a map.
    """

    layer: int
    module: nn.Module
    width: int
    experts: range | None = None

    @property
    def size(self) -> int:
        """Bytes of its matrices."""
        return 8 * self.width**2 * (1 if self.experts is None else len(self.experts))


@dataclass(frozen=True)
class Gathered:
    """What was gathered in a place.

    Attributes:
        gram: g'g, (m, m), or (experts, m, m) of experts; in float64 on the CPU.
        tokens: that it is of, by expert; of a map one number.
    """

    gram: Tensor
    tokens: tuple[int, ...]


def places_of(layer: int, module: nn.Module, width: int, count: int | None, held: int | None = None) -> list[Place]:
    """That of a map, or those of ``count`` experts, of which so many lie in one place as ``held`` bytes allow.

    All of a layer's, unless they take more than a quarter of the free memory: each further place is a pass.
    """
    if count is None:
        return [Place(layer, module, width)]
    each = max(1, (held or max(HELD_BYTES, free_memory() // 4)) // (8 * width**2))
    return [Place(layer, module, width, range(at, min(at + each, count))) for at in range(0, count, each)]


@torch.no_grad()
def grams(
    model: nn.Module, batches: Sequence[Batch], places: Sequence[Place], *, held: int | None = None
) -> Iterator[Gathered]:
    """For each place g'g of what enters it.

    Of experts a token counts by the square of what they weigh for it, since that is how an error of theirs counts.

    Args:
        batches: on the model's device.
        places: in the order of their layers.
        held: bytes of matrices that are gathered in one pass; None: `HELD_BYTES`, or a quarter of the free memory if
            that is less. One place at least.

    Raises:
        ModelError: experts are called in a way that we do not know.
    """
    at, room = 0, held or min(HELD_BYTES, free_memory() // 4)
    while at < len(places):
        stop = at + 1
        while stop < len(places) and sum(place.size for place in places[at : stop + 1]) <= room:
            stop += 1
        takers = [_OfExperts(place) if place.experts is not None else _OfMap(place.module) for place in places[at:stop]]
        _pass(model, batches, takers, places[stop - 1].layer + 1)
        while takers:
            yield takers.pop(0).gathered()  # as large as it is, it has no reason to wait here
        at = stop


@torch.no_grad()
def stream(model: nn.Module, batches: Sequence[Batch], norms: Sequence[nn.Module]) -> tuple[Tensor, Tensor]:
    """The mean of x x' of what enters all norms, and the last alone, (d, d), each x of mean square 1; as `grams`."""
    every, last = _OfMap(*norms, unit=True), _OfMap(norms[-1], unit=True)
    _pass(model, batches, [every, last], None)
    return every.mean(), last.mean()


class _OfMap:
    """Gathers what enters a module, or the sum of what enters several."""

    def __init__(self, *modules: nn.Module, unit: bool = False) -> None:
        self._modules, self._unit, self._tokens = modules, unit, 0
        self._gram: Tensor | None = None

    @contextmanager
    def hooked(self, batch: Batch) -> Iterator[None]:
        """Within the block it takes what a batch brings."""
        with ExitStack() as hooks:
            for module in self._modules:
                hooks.enter_context(entering_any(module, partial(self._take, batch)))
            yield

    def mean(self) -> Tensor:
        """Of x x' over all tokens that came to any."""
        gathered = self.gathered()
        return gathered.gram / gathered.tokens[0]

    def gathered(self) -> Gathered:
        """All of it."""
        assert self._gram is not None, "a module that text does not come to"
        return Gathered(self._gram, (self._tokens,))

    def _take(self, batch: Batch, entered: Tensor) -> None:
        real = batch.real(entered).float()
        if self._unit:
            real = real / real.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
        # A batch's products in float32, their sum over batches in float64.
        product = (real.T @ real).to("cpu", torch.float64)
        self._gram = self._gram.add_(product) if self._gram is not None else product
        self._tokens += len(real)


class _OfExperts:
    """Gathers what enters the last map of each of some experts."""

    def __init__(self, place: Place) -> None:
        assert place.experts is not None
        self._place, self._numbers, self._asking = place, place.experts, False
        self._gram = torch.zeros(len(place.experts), place.width, place.width, dtype=torch.float64)
        self._tokens = [0] * len(place.experts)
        self._experts: Experts | None = None

    def hooked(self, batch: Batch) -> AbstractContextManager[None]:
        """See `_OfMap`."""
        return calling(self._place.module, partial(self._take, batch))

    def gathered(self) -> Gathered:
        """See `_OfMap`."""
        return Gathered(self._gram, tuple(self._tokens))

    def _take(self, batch: Batch, values: Sequence[Any]) -> None:
        if self._asking:  # what is asked of the module itself calls it again
            return
        self._asking = True
        try:
            self._add(batch, values)
        finally:
            self._asking = False

    def _add(self, batch: Batch, values: Sequence[Any]) -> None:
        called = called_with(values)
        if called is None or len(called[0]) != batch.ids.numel():
            raise self._unknown()
        tokens, chosen, weights = (batch.real(part) for part in called)
        if self._experts is None:
            self._experts = known_experts(self._place.module, (tokens, chosen, weights))
            if self._experts is None or self._experts.inner != self._place.width:
                raise self._unknown()
        for place, number in enumerate(self._numbers):
            rows, columns = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                inner = self._experts.entering(number, tokens[rows]).float() * weights[rows, columns, None].float()
                self._gram[place] += (inner.T @ inner).to("cpu", torch.float64)
                self._tokens[place] += len(rows)

    def _unknown(self) -> ModelError:
        return ModelError(
            f"layer {self._place.layer}: its experts are called in a way that lmprune does not know, so that their "
            "neurons cannot be chosen. Use --with depth"
        )


def _pass(model: nn.Module, batches: Sequence[Batch], takers: Sequence[_OfMap | _OfExperts], stop: int | None) -> None:
    """Run all batches through the decoder, up to layer ``stop``; ``takers`` get what enters their modules."""
    layers, decoder = find_stack(model).layers, decoder_of(model)

    def end(_: Any) -> None:
        raise _Enough

    with evaluating(model):
        for batch in batches:
            with ExitStack() as hooks:
                hooks.enter_context(suppress(_Enough))
                for taker in takers:
                    hooks.enter_context(taker.hooked(batch))
                if stop is not None and stop < len(layers):
                    hooks.enter_context(entering_any(layers[stop], end))
                run_decoder(decoder, batch)
