"""One layer in place of a block, trained to give what the block gave: the squared error of its output."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lmprune.cuts.plan import Plan
from lmprune.errors import DataError
from lmprune.forward.batches import Batch
from lmprune.forward.calls import evaluating
from lmprune.healing.layerwise import Layerwise
from lmprune.healing.solving import share

HELD = 5
"""Each fifth batch does not train, to choose by."""
_DECAY = 1e-3
"""AdamW's weight decay, as published."""


class Options(Protocol):
    """What `methods.streamline` lets a user choose."""

    @property
    def layer_epochs(self) -> int: ...
    @property
    def layer_batch_size(self) -> int: ...
    @property
    def layer_lr(self) -> float: ...


def streamline(
    student: nn.Module,
    whole: nn.Module,
    plan: Plan,
    blocks: NDArray[np.int32] | Sequence[NDArray[np.int32]],
    options: Options,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train the layer before each gap of the live ``student``, in place; the others stay.

    Raises:
        DataError: there are fewer than two samples.
    """
    if len(blocks) < 2:
        raise DataError(f"a repair needs at least 2 samples of text, and there is {len(blocks)}. Give more")
    size = min(options.layer_batch_size, len(blocks) // 2)
    rows = [np.asarray(row) for row in blocks]
    batches = [Batch.of(rows[at : at + size], torch.device("cpu")) for at in range(0, len(rows), size)]
    ends = [*plan.kept[1:], plan.layers]
    layers = []
    with evaluating(student), evaluating(whole):
        ours, theirs = Layerwise(student, batches), Layerwise(whole, batches)
        for model in (ours, theirs):
            model.begin()
        for layer in range(plan.kept[0]):
            theirs.pass_on(layer)
        for place, (layer, end) in enumerate(zip(plan.kept, ends)):
            for gone in range(layer, end):
                theirs.pass_on(gone)
            if end != layer + 1:
                before, after = _Training(ours, place, list(theirs.states), batches, options).train()
                say(f"layer {layer}, for {layer} to {end - 1}: error {before:.3f} -> {after:.3f}")
                layers.append({"layer": layer, "stands_for": list(range(layer, end)), "before": before, "after": after})
            ours.pass_on(place)
    return {"layers": layers}


class _Training:
    """Of one layer."""

    def __init__(
        self, model: Layerwise, place: int, targets: Sequence[Tensor], batches: Sequence[Batch], options: Options
    ) -> None:
        self._model, self._place, self._targets, self._batches = model, place, targets, batches
        self._options, self._layer = options, model.layers[place]
        numbers = range(len(batches))
        self._held = [n for n in numbers if n % HELD == HELD - 1] or [len(batches) - 1]
        self._fit = [n for n in numbers if n not in self._held]

    def _error(self, number: int) -> tuple[Tensor, float]:
        """The squared error of one batch, and the size of what should be added; without padding."""
        state, batch = self._model.states[number], self._batches[number]
        output = self._model.run(self._place, number, state)
        wanted = self._targets[number].to(output)
        error = batch.real(output - wanted).square().sum()
        return error, float(batch.real(wanted - state.to(wanted)).square().sum())

    @torch.no_grad()
    def _judged(self) -> float:
        found = [self._error(number) for number in self._held]
        return share(sum(float(error) for error, _ in found), sum(size for _, size in found))

    def train(self) -> tuple[float, float]:
        """The error on held-out text before and after, as a share of what the block adds."""
        parameters = [parameter for parameter in self._layer.parameters() if parameter.is_floating_point()]
        asked = [parameter.requires_grad for parameter in parameters]
        before = best = self._judged()
        kept = [parameter.detach().clone() for parameter in parameters]
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters, lr=self._options.layer_lr, weight_decay=_DECAY)
        steps = self._options.layer_epochs * len(self._fit)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.25 + 0.375 * (1 + math.cos(math.pi * step / steps))
        )
        order = np.random.default_rng(0)
        for _ in range(self._options.layer_epochs):
            for number in order.permutation(self._fit):
                with torch.enable_grad():
                    error, size = self._error(int(number))
                    (error / max(size, 1e-12)).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
            now = self._judged()
            if now < best:
                best, kept = now, [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            for parameter, value, was in zip(parameters, kept, asked):
                parameter.copy_(value)
                parameter.requires_grad_(was)
        return before, best
