"""Magnitude compensation: the state at each cut times one number, folded into what writes before it (Prune&Comp).

The layers that are gone made the residual stream larger. With x what enters the first of them and y what enters the
layer after them, both in the whole model, alpha = E|y| / E|x| over tokens. A state is multiplied by alpha by
multiplying all that writes to it: the embeddings, and each earlier layer's projections or the norms after them. What
reads it normalises it first, so that nothing else changes, but for the epsilon of the norms. A head that shares the
embeddings' weights is kept as it was by the final norm, whose weights are divided. The idea is that of arXiv 2507.18212
(no code); the formula and the folding are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from operator import mul
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lmprune.cuts.plan import Plan
from lmprune.errors import DataError, ModelError, UsageError
from lmprune.forward.batches import Batch
from lmprune.forward.calls import changing, decoder_of, entering, entering_any, evaluating, leaving, run_decoder
from lmprune.healing.layerwise import Layerwise
from lmprune.healing.norms import Norm
from lmprune.healing.writers import Writer, writers_of
from lmprune.models.stack import find_stack, unwrapped

_BATCH = 8
TOLERANCE = 1e-2
"""Of the change that the scaling makes to the logits, by which folded and hooked may differ: the norms' epsilon."""


@dataclass(frozen=True)
class Scale:
    """The state that enters the layers after a cut is multiplied.

    Attributes:
        place: the cut model's layer that comes after the cut.
        alpha: by what.
    """

    place: int
    alpha: float


def compensate(
    student: nn.Module, whole: nn.Module, plan: Plan, blocks: NDArray[np.int32] | Sequence[NDArray[np.int32]]
) -> tuple[Scale, ...]:
    """Fold one factor for each cut into the live ``student``, in place; one pass of ``whole`` over ``blocks``.

    Args:
        blocks: token ids, a sample each, of one length or of several.

    Returns:
        The factors, in the order of the layers. What goes at the very end has none: the final norm would undo it.

    Raises:
        DataError: there is no text.
        ModelError: a factor cannot be folded; the student is as it was.
        UsageError: no layer follows a cut.
    """
    scales = scales_of(whole, plan, blocks)
    fold(student, scales, [np.asarray(blocks[0])])
    return scales


def scales_of(
    whole: nn.Module, plan: Plan, blocks: NDArray[np.int32] | Sequence[NDArray[np.int32]]
) -> tuple[Scale, ...]:
    """The factors, from the mean lengths of the whole model's states; errors as `compensate`."""
    starts = [0, *(layer + 1 for layer in plan.kept)]
    gaps = [(place, start, layer) for place, (start, layer) in enumerate(zip(starts, plan.kept)) if start != layer]
    if not gaps:
        raise UsageError("no layer follows a cut, so that there is nothing to compensate")
    if not len(blocks):
        raise DataError("a repair needs text, and there is none")
    sums: dict[int, float] = {}
    stack, decoder = find_stack(whole), decoder_of(whole)
    device = next(decoder.parameters()).device

    def take(layer: int, batch: Batch, state: Tensor) -> None:
        lengths = batch.real(state).double().norm(dim=-1)
        sums[layer] = sums.get(layer, 0.0) + float(lengths.sum())

    with evaluating(whole), torch.no_grad():
        for start in range(0, len(blocks), _BATCH):
            batch = Batch.of([np.asarray(row) for row in blocks[start : start + _BATCH]], device)
            with ExitStack() as hooks:
                for layer in {layer for _, first, last in gaps for layer in (first, last)}:
                    hooks.enter_context(entering(stack.layers[layer], partial(take, layer, batch)))
                run_decoder(decoder, batch)
    return tuple(Scale(place, sums[last] / sums[first]) for place, first, last in gaps)


def fold(student: nn.Module, scales: Sequence[Scale], rows: Sequence[NDArray[np.int32]]) -> None:
    """Multiply all that writes before each place, and make sure on ``rows`` that the states are what they should be.

    Raises:
        ModelError: they are not, or something else than a linear map writes; the student is as it was.
    """
    batch = Batch.of([row[:32] for row in rows], next(student.parameters()).device)
    with evaluating(student), torch.no_grad():
        factors = factors_of(student, scales, rows)
        untouched = logits_of(student, batch)
        with ExitStack() as hooks:
            for scale in scales:
                layer = find_stack(student).layers[scale.place]
                hooks.enter_context(changing(layer, partial(mul, scale.alpha)))
            wanted = logits_of(student, batch)
        before = [(parameter, parameter.detach().clone()) for parameter in factors]
        for parameter, (factor, offset) in factors.items():
            parameter.copy_((parameter.double() + offset) * factor - offset)
        wrong = float((logits_of(student, batch) - wanted).norm())
        change = float((wanted - untouched).norm())
        # In few bits, each multiplied weight is rounded again.
        rounding = torch.finfo(next(student.parameters()).dtype).eps * float(wanted.norm())
        if not wrong <= TOLERANCE * change + 8 * rounding:
            for parameter, values in before:
                parameter.copy_(values)
            raise _refused(student, f"what was folded differs by {wrong / change:.2g} of the change itself")


def _refused(model: nn.Module, reason: str) -> ModelError:
    return ModelError(f"{unwrapped(model).config.model_type}: a factor cannot be folded: {reason}. Use refit")


def logits_of(model: Any, batch: Batch) -> Tensor:
    """Of the real tokens, (tokens, vocabulary) in float64."""
    logits: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    return batch.real(logits).double()


# --- what is multiplied ---------------------------------------------------------------------------------------------


def factors_of(
    student: nn.Module, scales: Sequence[Scale], rows: Sequence[NDArray[np.int32]]
) -> dict[Tensor, tuple[float, float]]:
    """By each parameter that changes, its factor and what it is an offset from: 1 in Gemma's norms, else 0."""
    layerwise = Layerwise(student, [Batch.of(list(rows[:1]), torch.device("cpu"))])
    layerwise.begin()
    factors: dict[Tensor, tuple[float, float]] = {}
    for place in range(max(scale.place for scale in scales)):
        factor = _product(scales, after=place)
        state = layerwise.states[0][:1, : layerwise.probe.ids.shape[1]]
        for writer in writers_of(layerwise, place, state):
            for parameter, offset in _written_by(layerwise.layers[place], writer):
                factors[parameter] = (factor, offset)
        layerwise.pass_on(place)
    everywhere = _product(scales, after=-1)
    factors |= {embedding: (everywhere, 0.0) for embedding in _embeddings(student)}
    head = getattr(unwrapped(student).get_output_embeddings(), "weight", None)
    if head is not None and any(head is parameter for parameter in factors):
        norm = _final_norm(student, layerwise.probe)
        factors[norm.weight] = (1 / everywhere, _offset(norm))
        if getattr(norm, "bias", None) is not None:
            factors[norm.bias] = (1 / everywhere, 0.0)
    return factors


def _product(scales: Sequence[Scale], *, after: int) -> float:
    """What the layer ``after`` is multiplied by: the factors of all cuts behind it. -1 stands for the embeddings."""
    return float(np.prod([scale.alpha for scale in scales if scale.place > after]))


def _written_by(layer: nn.Module, writer: Writer) -> Iterator[tuple[Tensor, float]]:
    last: Any = layer.get_submodule(writer.last)
    if writer.experts:
        yield from ((parameter, 0.0) for parameter in writer.changed(layer).values())
        return
    yield last.weight, _offset(last) if writer.norm else 0.0
    if getattr(last, "bias", None) is not None:
        yield last.bias, 0.0


def _offset(norm: Any) -> float:
    """What is added to a norm's weights before they multiply."""
    return float((Norm(norm).gain - norm.weight.detach().cpu().double())[0])


def _embeddings(student: nn.Module) -> list[Tensor]:
    """The tables of what enters the first layer: of tokens, and of places where these are learnt."""
    model = unwrapped(student)
    inside = {id(part) for part in find_stack(student).layers.modules()}
    tables = [part for part in decoder_of(model).modules() if isinstance(part, nn.Embedding) and id(part) not in inside]
    return [table.weight for table in tables]


def _final_norm(student: nn.Module, probe: Batch) -> Any:
    """The one norm that what leaves the last layer goes through.

    Raises:
        ModelError: there is none.
    """
    stack, decoder = find_stack(student), decoder_of(student)
    inside = {id(part) for part in stack.layers.modules()}
    norms = [
        part
        for part in decoder.modules()
        if id(part) not in inside and isinstance(weight := getattr(part, "weight", None), Tensor) and weight.dim() == 1
    ]
    left: list[bool] = []
    called: list[nn.Module] = []

    def note(norm: nn.Module, state: Tensor) -> None:
        if left:
            called.append(norm)

    with ExitStack() as hooks:
        hooks.enter_context(leaving(stack.layers[-1], lambda state: left.append(True)))
        for norm in norms:
            hooks.enter_context(entering_any(norm, partial(note, norm)))
        run_decoder(decoder, probe.to(next(decoder.parameters()).device))
    if len(called) != 1:
        raise _refused(student, f"its head shares the embeddings, and {len(called)} norms stand before it")
    return called[0]
