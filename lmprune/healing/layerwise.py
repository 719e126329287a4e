"""A model that is run layer by layer over batches.

The states of all batches wait between layers, so that a layer may be changed before the next one sees what it makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lmprune.errors import ModelError
from lmprune.forward.batches import Batch
from lmprune.forward.calls import (
    check_state,
    decoder_of,
    entering,
    given,
    leaving,
    not_run_once,
    output_of,
    run_decoder,
    standing_in,
    with_output,
)
from lmprune.forward.streaming import OneByOne
from lmprune.models.stack import find_stack, unwrapped

Watch = Callable[[Callable[[Tensor], object]], AbstractContextManager[None]]
"""Watches a value within a layer: within the block the function gets it."""
_PROBE = 12
"""Tokens that a layer's structure is found with."""


class Shelf(Protocol):
    """Where tensors wait: a list, or `OnDisk`."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Tensor: ...
    def __setitem__(self, number: int, tensor: Tensor, /) -> None: ...
    def __iter__(self) -> Iterator[Tensor]: ...
    def append(self, tensor: Tensor, /) -> None:
        """One more."""


class OnDisk:
    """Tensors that wait in files of a folder, which go with the object."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = TemporaryDirectory(dir=folder, prefix="states-")
        self._kinds: list[tuple[torch.dtype, torch.Size]] = []

    def __len__(self) -> int:
        return len(self._kinds)

    def _file(self, number: int) -> Path:
        return Path(self._folder.name) / str(number)

    def __getitem__(self, number: int) -> Tensor:
        dtype, shape = self._kinds[number]
        content = torch.from_numpy(np.fromfile(self._file(number), dtype=np.uint8))
        return content.view(dtype).view(shape)

    def __setitem__(self, number: int, tensor: Tensor) -> None:
        self._kinds[number] = tensor.dtype, tensor.shape
        tensor.contiguous().view(-1).view(torch.uint8).numpy().tofile(self._file(number))

    def __iter__(self) -> Iterator[Tensor]:
        return (self[number] for number in range(len(self)))

    def append(self, tensor: Tensor) -> None:
        """One more."""
        self._kinds.append((tensor.dtype, tensor.shape))
        self[len(self) - 1] = tensor


class _Enough(Exception):
    """Leaves a forward pass once all that was wanted is there."""


class Layerwise:
    """A model of which one layer at a time is run.

    Args:
        model: a live one, or one that is read layer by layer: then a layer is there while it is held.
        shelf: makes the places in which states wait.

    Attributes:
        layers: its decoder layers.
        states: for each batch what enters the next layer, (samples, length, width), on the CPU.
        runs: batches that went through a layer, or through a part of one.

    Raises:
        ModelError: its layers hand on more than one state.
    """

    def __init__(
        self, model: nn.Module | OneByOne, batches: Sequence[Batch], shelf: Callable[[], Shelf] = list
    ) -> None:
        self._streamed = model if isinstance(model, OneByOne) else None
        self.model: nn.Module = model.model if isinstance(model, OneByOne) else model
        self.layers = find_stack(self.model).layers
        self.shelf = shelf
        self.states: Shelf = shelf()
        self.runs = 0
        self._decoder = decoder_of(self.model)
        self._device = next(self._decoder.parameters()).device
        self._batches = [batch.to(self._device) for batch in batches]
        self._forms: list[Any] = []
        self._probed: list[Any] = []
        """Of a streamed model: what waits for each layer that was held, of the probe."""
        if self._streamed is None:
            self._look()
        else:
            self._probed.append(self._streamed.begin(self.probe.to(self._device)))

    @torch.no_grad()
    def _look(self) -> None:
        """Learn how each layer returns its state; besides it there may be what nobody reads, as attention weights."""
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
            self._check(place, state, after)

    def _check(self, place: int, state: Tensor, after: Tensor) -> None:
        """Whether layer ``place``, run by itself on the probe's ``state``, makes ``after`` of it."""
        probe = self.probe.to(self._device)
        check_state(state, probe)
        try:
            same = close(self.run(place, probe, state), after, after)
        except (RuntimeError, LookupError, TypeError, AttributeError):  # it wants what an earlier layer left
            same = False
        if not same:
            raise self._refused("its layers hand on more than one state")

    @contextmanager
    def holding(self, place: int) -> Iterator[nn.Module]:
        """Within the block layer ``place`` can be run. All before it must have been held once."""
        if self._streamed is None:
            yield self.layers[place]
            return
        with torch.no_grad(), self._streamed.holding(place) as layer:
            if place == len(self._forms):
                probe, waiting = self.probe.to(self._device), self._probed[0]
                after, form, self._probed[0] = self._streamed.through(place, probe, waiting)
                self._forms.append(form)
                self._check(place, waiting.hidden, after)
            yield layer

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

    def put(self, states: Iterable[Tensor]) -> None:
        """Have these wait for the next layer, in place of those that do."""
        shelf = self.shelf()
        for state in states:
            shelf.append(state)
        self.states = shelf

    @torch.no_grad()
    def begin(self) -> None:
        """Put what enters the first layer into `states`."""
        self.put(self._to_first(batch).cpu() for batch in self._batches)

    def _to_first(self, batch: Batch) -> Tensor:
        with _caught() as caught, entering(self.layers[0], caught.stop):
            run_decoder(self._decoder, batch)
        return caught.state(0)

    def run(self, place: int, batch: int | Batch, hidden: Tensor, until: Watch | None = None) -> Tensor:
        """What layer ``place`` makes of ``hidden``, or the first value that ``until`` watches, where it then ends."""
        layer = self.layers[place]
        self.runs += isinstance(batch, int)
        of = self._batches[batch] if isinstance(batch, int) else batch
        hidden = hidden.to(self._device)
        with ExitStack() as hooks:
            caught = hooks.enter_context(_caught())
            for before, form in zip(self.layers[:place], self._forms):
                hooks.enter_context(standing_in(before, with_output(form, hidden)))
            hooks.enter_context(given(layer, hidden))
            hooks.enter_context(leaving(layer, caught.stop) if until is None else until(caught.stop))
            run_decoder(self._decoder, of)
        return caught.state(place)

    @torch.no_grad()
    def after(self, batch: int, hidden: Tensor) -> Tensor:
        """What the decoder makes of the state that leaves its last layer: it goes through the final norm."""
        with ExitStack() as hooks:
            for layer, form in zip(self.layers, self._forms):
                hooks.enter_context(standing_in(layer, with_output(form, hidden.to(self._device))))
            output = run_decoder(self._decoder, self._batches[batch])
        return output_of(output if isinstance(output, (tuple, Tensor)) else output.last_hidden_state)

    @contextmanager
    def heading(self) -> Iterator[Callable[[Batch, Tensor], Tensor]]:
        """Within the block a function from a batch and what leaves its last layer to logits, the model's own."""
        with ExitStack() as held:
            model = self.model if self._streamed is None else held.enter_context(self._streamed.with_head())
            yield partial(self._logits, model)

    def _logits(self, model: nn.Module, batch: Batch, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self._device)
        with ExitStack() as hooks:
            for layer, form in zip(find_stack(model).layers, self._forms):
                hooks.enter_context(standing_in(layer, with_output(form, hidden)))
            logits: Tensor = run_decoder(model, batch.to(self._device)).logits
        return logits

    @torch.no_grad()
    def pass_on(self, place: int) -> None:
        """Run layer ``place`` on all that waits."""
        with self.holding(place):
            for number in range(len(self.states)):
                self.states[number] = self.run(place, number, self.states[number]).cpu()


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


def close(a: Tensor, b: Tensor, scale: Tensor) -> bool:
    """Whether two changes of a state are one, as far as its type tells."""
    tolerance = 1e-3 if scale.dtype == torch.float32 else 3e-2
    return bool((a - b).float().norm() <= tolerance * scale.float().norm())
