"""Two models run layer by layer over the same batches, and where their layers write to the residual stream.

The states of all batches wait between layers, so that a layer may be changed before the next one sees what it makes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lmprune.errors import ModelError
from lmprune.forward.batches import Batch
from lmprune.forward.calls import (
    check_state,
    decoder_of,
    entering,
    entering_any,
    given,
    leaving,
    not_run_once,
    output_of,
    run_decoder,
    standing_in,
    with_output,
)
from lmprune.models.stack import find_stack, unwrapped

_PROBE = 12
"""Tokens that a layer's structure is found with."""


class _Enough(Exception):
    """Leaves a forward pass once all that was wanted is there."""


class Layerwise:
    """A live model of which one layer at a time is run.

    Attributes:
        layers: its decoder layers.
        states: for each batch what enters the next layer, (samples, length, width), on the CPU.

    Raises:
        ModelError: its layers hand on more than one state.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.model = model
        self.layers = find_stack(model).layers
        self.states: list[Tensor] = []
        self._decoder = decoder_of(model)
        self._device = next(self._decoder.parameters()).device
        self._batches = [batch.to(self._device) for batch in batches]
        self._forms = self._answers()

    @torch.no_grad()
    def _answers(self) -> list[Any]:
        """How each layer returns its state; besides it there may be what nobody reads, as attention weights."""
        states: list[Tensor] = []
        forms: list[Any] = []
        probe = self.probe.to(self._device)
        with ExitStack() as hooks:
            for layer in self.layers:
                hooks.enter_context(entering(layer, lambda state: states.append(state.clone())))
                hooks.enter_context(leaving(layer, forms.append, whole=True))
            run_decoder(self._decoder, probe)
        if len(forms) != len(self.layers):
            raise self._refused(f"on text the decoder runs {len(forms)} of its {len(self.layers)} layers")
        self._forms = [form if isinstance(form, (tuple, list)) else None for form in forms]
        states.append(output_of(forms[-1]).clone())
        for place, (state, after) in enumerate(zip(states, states[1:])):
            check_state(state, probe)
            try:
                same = _close(self.run(place, probe, state), after, after)
            except (RuntimeError, LookupError, TypeError, AttributeError):  # it wants what an earlier layer left
                same = False
            if not same:
                raise self._refused("its layers hand on more than one state")
        return self._forms

    def _refused(self, reason: str) -> ModelError:
        return ModelError(
            f"{unwrapped(self.model).config.model_type}: {reason}, so that none can be refitted by itself. "
            "Heal it with --method lora"
        )

    @property
    def probe(self) -> Batch:
        """A few tokens of the first sample."""
        ids = self._batches[0].ids[:1, :_PROBE]
        length = min(_PROBE, int(self._batches[0].lengths[0]))
        return Batch(ids[:, :length], self._batches[0].lengths[:1].clamp(max=length), None)

    @torch.no_grad()
    def begin(self) -> None:
        """Put what enters the first layer into `states`."""
        self.states = [self._to_first(batch).cpu() for batch in self._batches]

    def _to_first(self, batch: Batch) -> Tensor:
        with _caught() as caught, entering(self.layers[0], caught.stop):
            run_decoder(self._decoder, batch)
        return caught.state(0)

    @torch.no_grad()
    def run(self, place: int, batch: int | Batch, hidden: Tensor, until: nn.Module | None = None) -> Tensor:
        """What layer ``place`` makes of ``hidden``, or what enters the module ``until`` of it, where it then ends."""
        layer = self.layers[place]
        of = self._batches[batch] if isinstance(batch, int) else batch
        hidden = hidden.to(self._device)
        with ExitStack() as hooks:
            caught = hooks.enter_context(_caught())
            for before, form in zip(self.layers[:place], self._forms):
                hooks.enter_context(standing_in(before, with_output(form, hidden)))
            hooks.enter_context(given(layer, hidden))
            watched = leaving(layer, caught.stop) if until is None else entering_any(until, caught.stop)
            hooks.enter_context(watched)
            run_decoder(self._decoder, of)
        return caught.state(place)

    def pass_on(self, place: int) -> None:
        """Run layer ``place`` on all that waits."""
        for number, hidden in enumerate(self.states):
            self.states[number] = self.run(place, number, hidden).cpu()


class _Caught:
    def __init__(self) -> None:
        self._states: list[Tensor] = []

    def stop(self, state: Tensor) -> None:
        self._states.append(state)
        raise _Enough

    def state(self, place: int) -> Tensor:
        if not self._states:
            raise not_run_once(place, 0)
        return self._states[0]


@contextmanager
def _caught() -> Iterator[_Caught]:
    """Within the block a pass may be ended with a state."""
    with suppress(_Enough):
        yield _Caught()


# --- where a layer writes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """A linear map whose output is added to the residual stream.

    Attributes:
        path: of the linear map in its layer.
        norm: of a norm that its output goes through first, as in Gemma 2; empty where there is none.
        factor: what it is multiplied by as it is added, as in Granite.
    """

    path: str
    norm: str
    factor: float

    @property
    def last(self) -> str:
        """The module whose output is added."""
        return self.norm or self.path

    def linear(self, layer: nn.Module) -> nn.Module:
        """The linear map of that layer."""
        return layer.get_submodule(self.path)

    def adds(self, layer: nn.Module, inputs: Tensor) -> Tensor:
        """What is added to the stream, (..., width), for these inputs of the linear map."""
        output: Tensor = self.linear(layer)(inputs)
        return self.factor * (layer.get_submodule(self.norm)(output) if self.norm else output)


@contextmanager
def writing(layer: nn.Module, left: dict[Writer, list[Tensor]]) -> Iterator[None]:
    """Within the block what ``layer`` adds to the stream by each writer goes to the writer's list, (..., width)."""

    def take(writer: Writer, output: Tensor) -> None:
        left[writer].append((writer.factor * output).cpu())  # a new tensor: some models add to it in place

    with ExitStack() as hooks:
        for writer in left:
            hooks.enter_context(leaving(layer.get_submodule(writer.last), partial(take, writer)))
        yield


def weight_of(linear: nn.Module) -> Tensor:
    """Its weight as (d_in, d_out), then its bias as one more row, in float64 on the CPU."""
    weight: Any = linear.weight.detach().to("cpu", torch.float64)
    weight = weight if isinstance(linear, Conv1D) else weight.T
    bias: Any = linear.bias
    return weight if bias is None else torch.cat([weight, bias.detach().to("cpu", torch.float64)[None]])


def set_weight(linear: Any, weight: Tensor) -> None:
    """Put back what `weight_of` gave, changed."""
    with torch.no_grad():
        if linear.bias is not None:
            weight, bias = weight[:-1], weight[-1]
            linear.bias.copy_(bias)
        linear.weight.copy_(weight if isinstance(linear, Conv1D) else weight.T)


def writers_of(model: Layerwise, place: int, hidden: Tensor) -> tuple[Writer, ...]:
    """Where layer ``place`` writes to the residual stream, in the order in which it does.

    Found by trying: what is added to a writer's output arrives unchanged in the layer's output, once the writers after
    it are held still. Their sum must be all that the layer adds.

    Args:
        hidden: the state (1, length, width) of `Layerwise.probe` that enters it.

    Raises:
        ModelError: something else than a linear map writes, as experts do.
    """
    return _Probe(model, place, hidden).writers()


class _Probe:
    def __init__(self, model: Layerwise, place: int, hidden: Tensor) -> None:
        self._model, self._place, self._hidden = model, place, hidden
        self._layer = model.layers[place]
        self._entered: dict[str, list[Tensor]] = {}
        self._left: dict[str, list[Tensor]] = {}
        parts = {name: part for name, part in self._layer.named_modules() if name and _is_candidate(part)}
        with ExitStack() as hooks:
            for name, part in parts.items():
                self._entered[name], self._left[name] = [], []
                hooks.enter_context(entering_any(part, self._entered[name].append))
                hooks.enter_context(leaving(part, partial(self._note, name)))
            self._output = self._run()
        self._called = [name for name in self._order if self._has_state(name)]

    def _note(self, name: str, output: Tensor) -> None:
        self._left[name].append(output.clone())  # some models add to it in place

    @property
    def _order(self) -> list[str]:
        return [name for name, outputs in self._left.items() if len(outputs) == 1]

    def _has_state(self, name: str) -> bool:
        left = self._left[name][0]  # OPT flattens it
        return left.shape[-1] == self._output.shape[-1] and left.numel() == self._output.numel()

    def _run(self) -> Tensor:
        return self._model.run(self._place, self._model.probe, self._hidden)

    def writers(self) -> tuple[Writer, ...]:
        factors: dict[str, float] = {}
        while found := self._straight(factors):
            factors |= found
        added = torch.zeros_like(self._output)
        for name, factor in factors.items():
            added = added + factor * self._left[name][0].view_as(added)
        wanted = self._output - self._hidden.to(self._output.device)
        if not factors or not _close(added, wanted, self._output):
            raise self._refused("what it adds to the residual stream is not what linear maps write")
        writers = [Writer(*self._linear_of(name), factor) for name, factor in factors.items()]
        for writer in writers:
            self._check(writer)
        ranks = {name: rank for rank, name in enumerate(self._ranked())}
        return tuple(sorted(writers, key=lambda writer: ranks[writer.path]))

    def _ranked(self) -> list[str]:
        """The parts in the order in which they are called."""
        order: list[str] = []
        with ExitStack() as hooks:
            for name in self._called:
                take = partial(lambda name, _: order.append(name), name)
                hooks.enter_context(entering_any(self._layer.get_submodule(name), take))
            self._run()
        return order

    def _straight(self, known: dict[str, float]) -> dict[str, float]:
        """Parts whose output goes straight to the layer's, with their factors, while those ``known`` stand still."""
        found = {}
        generator = torch.Generator().manual_seed(0)
        size = self._output.float().square().mean().sqrt().cpu()
        for name in self._called:
            if name in known:
                continue
            added = torch.randn(self._output.shape, generator=generator) * size
            added = added.to(self._output)
            moved = self._moved(name, added, known) - self._output
            factor = float((moved * added).sum() / added.square().sum())
            if abs(factor) > 1e-3 and _close(moved, factor * added, moved):
                found[name] = 1.0 if abs(factor - 1) < 1e-3 else factor
        return found

    def _moved(self, name: str, added: Tensor, known: dict[str, float]) -> Tensor:
        with ExitStack() as hooks:
            for still in known:
                hooks.enter_context(standing_in(self._layer.get_submodule(still), self._left[still][0].clone()))
            answer = self._left[name][0] + added.view_as(self._left[name][0])
            hooks.enter_context(standing_in(self._layer.get_submodule(name), answer))
            return self._run()

    def _linear_of(self, name: str) -> tuple[str, str]:
        """The paths of a writer and its norm; ``name`` is either."""
        if is_linear(self._layer.get_submodule(name)):
            return name, ""
        entered = self._entered[name][0]
        for other in self._called:
            if is_linear(self._layer.get_submodule(other)) and torch.equal(self._left[other][0], entered):
                return other, name
        raise self._refused(f"its {name} is not fed by a linear map alone")

    def _check(self, writer: Writer) -> None:
        weight: Any = writer.linear(self._layer).weight
        if not weight.is_floating_point() or weight.dim() != 2:
            raise ModelError(f"the weights of {writer.path} are in few bits: load the model as it is stored")
        named = unwrapped(self._model.model).named_parameters(remove_duplicate=False)
        if sum(parameter is weight for _, parameter in named) > 1:
            raise self._refused(f"its {writer.path} is shared with other layers")

    def _refused(self, reason: str) -> ModelError:
        experts = next((name for name, _ in self._layer.named_parameters() if "expert" in name), None)
        if experts is not None:
            reason = "it has experts, which are not repaired yet"
        kind = self._model.model.config.model_type
        return ModelError(f"{kind}: layer {self._place} cannot be refitted: {reason}. Heal it with --method lora")


def is_linear(part: nn.Module) -> bool:
    """Whether it is a linear map, GPT-2's transposed one too."""
    return isinstance(part, (nn.Linear, Conv1D))


def _is_candidate(part: nn.Module) -> bool:
    weight = getattr(part, "weight", None)
    norm = isinstance(weight, Tensor) and weight.dim() == 1 and not list(part.children())
    return norm or is_linear(part)


def _close(a: Tensor, b: Tensor, scale: Tensor) -> bool:
    """Whether two changes of a state are one, as far as its type tells."""
    tolerance = 1e-3 if scale.dtype == torch.float32 else 3e-2
    return bool((a - b).float().norm() <= tolerance * scale.float().norm())
