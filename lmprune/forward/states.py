"""What a criterion or a repair may ask of a live model besides its loss: hidden states, and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lmprune.cuts.plan import Plan
from lmprune.errors import DataError, LmpruneError, ModelError, UsageError
from lmprune.forward.batches import Batch, Row, Rows, batches_of
from lmprune.forward.calls import (
    check_state,
    decoder_of,
    entering,
    evaluating,
    input_device,
    leaving,
    not_run_once,
    run_decoder,
)
from lmprune.forward.machine import Halving
from lmprune.forward.objectives.loss import counted
from lmprune.forward.views import pruned_view
from lmprune.models.stack import find_stack
from lmprune.text.tokens import Tokens

_BATCH = 8


def states(
    model: Any, tokens: Tokens, places: Sequence[int], *, plan: Plan | None = None, batch_size: int = _BATCH
) -> Iterator[dict[int, NDArray[np.float32]]]:
    """The hidden states of ``model`` at ``places``, batch by batch: place -> (tokens, width), without padding.

    Place l is the input of layer l, and L the output of the last layer, before the final norm. The batches, and the
    order of tokens in them, depend on ``tokens`` and ``batch_size`` alone: states of two models or two plans stand row
    beside row.

    Args:
        plan: run the model without what it drops; the places are then those of the layers that are left.
        batch_size: samples in a forward pass, halved when memory runs out.

    Raises:
        UsageError: there is no such place.
        ModelError: the layers hand on more or less than one state for each token, or memory runs out.
    """
    runs = pruned_view(model, plan) if plan is not None else model
    layers, decoder = find_stack(runs).layers, decoder_of(runs)
    for place in places:
        if not 0 <= place <= len(layers):
            raise UsageError(f"no state {place}: this model has states 0 to {len(layers)}")
    device = input_device(decoder)

    def work(rows: Rows) -> dict[int, Tensor]:
        batch, found = Batch.of(rows, device), {}

        def take(place: int, hidden: Tensor) -> None:
            check_state(hidden, batch)
            if place in found:
                raise not_run_once(min(place, len(layers) - 1), 2)
            found[place] = batch.real(hidden).float().cpu()

        with evaluating(runs), torch.no_grad(), ExitStack() as hooks:
            for place in dict.fromkeys(places):
                watched = entering(layers[place], partial(take, place)) if place < len(layers) else None
                hooks.enter_context(watched or leaving(layers[-1], partial(take, place)))
            run_decoder(decoder, batch)
        for place in places:
            if place not in found:
                raise not_run_once(min(place, len(layers) - 1), 0)
        return found

    halving = Halving(work, _hopeless)
    for batch in batches_of([len(row) for row in tokens.rows], batch_size):
        parts = halving([tokens.rows[sample] for sample in batch])
        yield {place: torch.cat([part[place] for part in parts]).numpy() for place in places}


def gradients(
    model: Any, tokens: Tokens, *, batch_size: int = _BATCH
) -> Iterator[tuple[int, str, NDArray[np.float32], NDArray[np.float32]]]:
    """(layer, name within it, weight, gradient) of every parameter of each decoder layer, one by one.

    The gradient is that of the mean loss over all predicted tokens, or over those of answers. It takes memory for the
    gradients of all layers twice, in the weights' type; each is freed once the next is asked for. The model's own
    ``grad`` and ``requires_grad`` are left as they were.

    Raises:
        UsageError: the weights are quantised, and have no gradient.
        DataError: no sample has a token to predict.
        ModelError: memory runs out even for one sample.
    """
    parameters = [
        (number, name, weight)
        for number, layer in enumerate(find_stack(model).layers)
        for name, weight in layer.named_parameters()
    ]
    if any(not weight.is_floating_point() for _, _, weight in parameters):
        raise UsageError("quantised weights have no gradient. Load the model without --quantization")
    count = int(tokens.predicted.sum())
    if not count:
        raise DataError(f"{tokens.source}: every sample is one token long, which leaves none to predict. Give more")
    found = _summed_gradients(model, [weight for _, _, weight in parameters], tokens, batch_size)
    for number, name, weight in parameters:
        yield number, name, _array(weight), _array(found.pop(0).div_(count))


def _summed_gradients(model: Any, weights: Sequence[nn.Parameter], tokens: Tokens, batch_size: int) -> list[Tensor]:
    """Of the loss summed over all tokens."""
    device = input_device(model)
    found = [torch.zeros_like(weight) for weight in weights]

    def work(samples: list[int]) -> None:
        batch = Batch.of([tokens.rows[sample] for sample in samples], device)
        mask = counted(tokens, samples, batch)
        logits = run_decoder(model, batch).logits[:, :-1].float()
        each = nn.functional.cross_entropy(logits.transpose(1, 2), batch.ids[:, 1:], reduction="none")
        loss = each.sum() if mask is None else (each * mask[:, 1:]).sum()
        # Not by backward(), which would add to the model's own gradients, in part where memory runs out.
        # An expert that no token goes to has no gradient.
        for total, part in zip(found, torch.autograd.grad(loss, list(weights), allow_unused=True), strict=True):
            if part is not None:
                total += part

    asked = {id(weight): weight.requires_grad for weight in model.parameters()}
    here = {id(weight) for weight in weights}
    try:
        for weight in model.parameters():
            weight.requires_grad_(id(weight) in here)
        with evaluating(model), torch.enable_grad():
            halving = Halving(work, lambda sample: _hopeless(tokens.rows[sample]))
            for batch in batches_of([len(row) for row in tokens.rows], batch_size):
                halving(batch)
    finally:
        for weight in model.parameters():
            weight.requires_grad_(asked[id(weight)])
    return found


def _array(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return array


def _hopeless(row: Row) -> LmpruneError:
    return ModelError(f"out of memory with one sample of {len(row)} tokens. Use a smaller --max-length")
