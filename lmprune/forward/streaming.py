"""The states, or the logits of many cuts, of a model that is read layer by layer, for models larger than memory.

The decoder itself is kept, with its embeddings and all it prepares for its layers: masks, rotary tables, whatever is
made of the ids. In place of its layers stand stubs that hand their input on. One after the other, each layer is read
into a model that transformers builds and fills, so that fused weights are its own, and takes its place in the decoder,
which runs with the state that waits in memory in place of that layer's input. The batches are those of a pass in
memory, so the values are the same bit for bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmprune.cuts.plan import Plan
from lmprune.errors import ModelError
from lmprune.forward.batches import Batch
from lmprune.forward.calls import (
    Take,
    decoder_of,
    entering,
    hidden_of,
    leaving,
    not_run_once,
    run_decoder,
    with_hidden,
    with_output,
)
from lmprune.forward.kept import width_of
from lmprune.forward.machine import free_memory
from lmprune.models.carrying import cut_names, finish_live, tensor_changes
from lmprune.models.checkpoint import TensorEntry, layer_prefix
from lmprune.models.companions import generation_config
from lmprune.models.cut import Cut
from lmprune.models.fields import layer_count
from lmprune.models.in_files import Files, keep_in_files, mark
from lmprune.models.loading import decoder_config, empty_model, model_class, text_part
from lmprune.models.stack import Stack, find_stack
from lmprune.models.tensors import read_tensor
from lmprune.quiet import no_load_report

_M_MMAP_THRESHOLD = -3
"""glibc's number for the size from which a block is mapped by itself (mallopt(3))."""
_LARGE = 1 << 18
_PLAIN = (str, int, float, type(None))
Outputs = Callable[[int, list[int], Any], None]
"""Gets the number of a batch, those of the cuts, and what the model returns."""
Notes = list[tuple[dict[str, Any], dict[str, Tensor | None]]]
"""For each module its plain attributes and its buffers."""


class _Enough(Exception):
    """Leaves a forward pass once the state that was wanted is there."""


class StreamedModel:
    """Runs batches through the decoder of a model, of which two layers are in memory at a time.

    Raises:
        ModelError: the folder is unreadable, or its tensors do not fit its config, or there is an adapter; where
            measuring, also that the decoder does not run its layers one after the other, each once.
    """

    def __init__(self, cut: Cut, *, dtype: str, device: torch.device) -> None:
        if cut.adapter is not None:
            raise ModelError(f"{cut.name} has an adapter, which is not read layer by layer. Use --no-stream")
        config = cut.live_config
        self.layers = layer_count(config.to_dict())
        self._class = model_class(config)
        self.config, self.device = config, device
        self._config = decoder_config(config, self._class)
        self._dtype = cut.dtype(dtype)
        self._device = device
        self._folder = cut.base.path
        tensors = cut.checkpoint.tensors
        taken = text_part(cut_names(tensors, cut.plan), config.model_type)
        self._stored = {new: tensors[old] for old, new in taken.items()}
        changes = tensor_changes(tensors, cut.plan, cut.whole_config.to_dict())
        self._changes = {taken[old]: change for old, change in changes.items() if old in taken}
        self._plan = cut.plan
        self._old = {new: old for old, new in taken.items()}
        self._prefix = layer_prefix(self._stored, self.layers)
        skeleton = empty_model(config)
        self._path = find_stack(skeleton).path
        self._tied: dict[str, str] = dict(skeleton.all_tied_weights_keys)
        self._head = _head_of(skeleton)
        self._notes: Notes | None = None

    def stored_as(self, layer: int | None, name: str) -> str | None:
        """The name in the base's files of the tensor ``name`` of that layer, or of the head where it is None.

        None where it is not stored as it is.
        """
        return self._old.get(f"{self._head if layer is None else f'{self._prefix}.{layer}'}.{name}")

    @torch.no_grad()
    def in_files(self, files: Files) -> PreTrainedModel:
        """The live model, put together layer by layer, whose weights wait in ``files``: for the CPU.

        Raises:
            ModelError: layers share tensors.
        """
        self.check_apart()
        _return_freed_memory()
        model = self._without_layers(head=True)
        layers = find_stack(model).layers
        for layer in range(self.layers):
            built = self._built(layer, self._read(layer))
            layers[layer] = find_stack(built).layers[layer]
            keep_in_files(layers[layer], files)
        model.__class__ = self._class
        model.all_tied_weights_keys = dict(self._tied)
        model.tie_weights()
        keep_in_files(model, files)  # tying makes the bias of a head anew
        if (drawn := generation_config(self._folder)) is not None:
            model.generation_config = drawn
        model.config._name_or_path = str(self._folder)
        mark(model, files)
        return model.eval()

    def check_apart(self) -> None:
        """Make sure that no layer shares tensors with another.

        Raises:
            ModelError: one does.
        """
        shared = _shared(self._tied, self._path)
        if shared:
            raise ModelError(
                f"{shared[0]} is shared between layers, which cannot be read one at a time. Use --no-stream"
            )

    def check_stored(self, layer: int, names: Iterable[str]) -> None:
        """Make sure that those tensors of a layer can be written one by one.

        Raises:
            ModelError: one is made of several when it is read, as fused experts may be.
        """
        for name in names:
            if self.stored_as(layer, name) is None:
                raise ModelError(
                    f"{name} of layer {layer} is stored in another form than it is used in, so that it cannot be "
                    "changed one layer at a time. Use --no-stream"
                )

    def run(self, batches: Sequence[Batch], takes: Sequence[Take]) -> None:
        """Every layer is read once and run on all batches; ``takes[i]`` gets each state of ``batches[i]``.

        The states are numbered as in `lmprune.forward.calls.watching`.
        """
        _return_freed_memory()
        with torch.no_grad(), ThreadPoolExecutor(1) as reader:
            frame = _Frame(self._without_layers(), self._notes)
            notes = frame.notes()
            left = [_taken(take, 0, frame.begin(batch)) for batch, take in zip(batches, takes, strict=True)]
            frame.drop_embedding()
            for layer in self._layer_by_layer(frame, reader):
                frame.recall(notes)
                for place, batch in enumerate(batches):
                    now = frame.through(layer, batch, left[place].to(self._device))
                    left[place] = _taken(takes[place], layer + 1, now)
            self._notes = frame.notes()

    def _layer_by_layer(self, frame: _Frame, reader: Executor) -> Iterator[int]:
        """The numbers of the layers; each is in its place in ``frame`` until the next, which is read meanwhile."""
        waiting = reader.submit(self._read, 0)
        for layer in range(self.layers):
            model = self._built(layer, waiting.result())
            if layer + 1 < self.layers:
                waiting = reader.submit(self._read, layer + 1)
            with frame.holding(layer, find_stack(model).layers[layer]):
                yield layer
            _empty(model)

    def at_once(self, batches: Sequence[Batch], cuts: int) -> int:
        """Of ``batches``, how many have room to wait for so many cuts in a quarter of the free memory; one at least."""
        width = width_of(self.config.get_text_config())
        tokens = max(batch.ids.numel() for batch in batches)
        # The state, and what the embedding gave.
        return max(1, int(free_memory() / 4 / (2 * cuts * tokens * width * self._dtype.itemsize)))

    def logits(self, batches: Sequence[Batch], plans: Sequence[Plan], take: Outputs) -> int:
        """Every layer is read once and run on all batches of all cuts of whole layers that keep it.

        Cuts that begin alike are one until they part. It takes memory for the state of each batch of each cut.

        Args:
            plans: which of this model's layers each cut is left without.
            take: ``take(batch, cuts, output)`` gets what the model returns for a batch, once for cuts that are one; of
                each batch that of the whole model first, where it is among ``plans``.

        Returns:
            How many samples layers were run on, summed over layers.
        """
        _return_freed_memory()
        ran = 0
        with torch.no_grad(), ThreadPoolExecutor(1) as reader:
            frame = _Frame(self._without_layers(), self._notes)
            notes = frame.notes()
            every = list(range(len(plans)))
            lanes = [_Lane(at, every, frame.begin(batch).to("cpu")) for at, batch in enumerate(batches)]
            frame.drop_embedding()
            for layer in self._layer_by_layer(frame, reader):
                frame.recall(notes)
                lanes = [part for lane in lanes for part in lane.parted(plans, layer)]
                for lane in lanes:
                    if layer not in plans[lane.cuts[0]].dropped:
                        state = lane.state.to(self._device)
                        lane.state = frame.through(layer, batches[lane.batch], state).to("cpu")
                        ran += len(batches[lane.batch].lengths)
            self._notes = frame.notes()
            del frame
            lanes.sort(key=lambda lane: min(len(plans[cut].dropped) for cut in lane.cuts))
            self._finish(batches, lanes, take)
        return ran

    def _finish(self, batches: Sequence[Batch], lanes: Sequence[_Lane], take: Outputs) -> None:
        """From the last layer's output to logits: final norm and head, as the model itself runs them."""
        model = self._without_layers(head=True)
        last = find_stack(model).layers[-1]
        for lane in lanes:
            state = lane.state.to(self._device)
            last.answer = lambda _, state=state: with_output(state.answer, state.hidden)
            take(lane.batch, lane.cuts, run_decoder(model, batches[lane.batch]))
        _empty(model)

    def _without_layers(self, *, head: bool = False) -> PreTrainedModel:
        """The model with stubs in place of its layers; of its head too, which the states do not need, unless asked."""
        stored, away = self._stored, "" if head else self._head
        left_out = tuple(f"{path}." for path in (self._prefix, away) if path)
        entries = {name: entry for name, entry in stored.items() if not name.startswith(left_out)}
        for tied, embedding in self._tied.items():
            if tied.startswith(left_out) and embedding not in stored and tied in stored:
                entries[embedding] = stored[tied]
        return self._built(None, self._read_all(entries), away)

    def _is_head(self, name: str) -> bool:
        return bool(self._head) and name.startswith(f"{self._head}.")

    def _read(self, layer: int) -> dict[str, Tensor]:
        """The tensors of one layer; also those that it shares with another, under whose name they are stored."""
        stored = self._stored
        entries = {name: entry for name, entry in stored.items() if name.startswith(f"{self._prefix}.{layer}.")}
        for target, source in self._tied.items():
            if target.startswith(f"{self._path}.{layer}.") and target not in stored and source in stored:
                entries[target] = stored[source]
        return self._read_all(entries)

    def _read_all(self, entries: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
        tensors = {name: read_tensor(entry) for name, entry in entries.items()}
        return tensors | {name: change(tensors[name]) for name, change in self._changes.items() if name in tensors}

    def _built(self, layer: int | None, tensors: Mapping[str, Tensor], head: str = "") -> PreTrainedModel:
        """A model of which there is nothing but that layer, or all but the layers and ``head``."""
        cls = _stripped(self._class, layer, head)
        with no_load_report():  # all but a layer is missing, on purpose, every time
            model, info = cls.from_pretrained(
                None,
                config=self._config,
                state_dict=dict(tensors),
                dtype=self._dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
            )
        inside = _path_of(decoder_of(model), model) if head else ""  # all of it, where the head is wanted too
        inside = inside if layer is None else f"{self._path}.{layer}."
        lacking = {name for name in info["missing_keys"] if name.startswith(inside)}
        other = {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
        found = {"missing": lacking, "unexpected": set(info["unexpected_keys"]), "mismatched": other}
        for kind, names in found.items():
            if layer is not None or head:
                names = {name for name in names if not self._is_head(name)}
            if names:
                raise ModelError(f"{self._folder} does not fit its config: {kind} tensor {min(names)!r}")
        if layer is not None:
            finish_live(model, self._plan)
        built: PreTrainedModel = model.eval().to(self._device)
        return built


def has_apart(cut: Cut) -> bool:
    """Whether each layer of ``cut`` can be read by itself: it has no adapter, and shares no tensor with another."""
    empty = cut.empty()
    return cut.adapter is None and not _shared(empty.all_tied_weights_keys, find_stack(empty).path)


def _shared(tied: Iterable[str], path: str) -> list[str]:
    """Tensors of layers that are others' too."""
    return [name for name in tied if name.startswith(f"{path}.")]


class OneByOne:
    """A model of which each layer is read when it is wanted, in any order, and forgotten after it.

    Attributes:
        model: the model without its head, with stubs in place of its layers.
        layers: the stubs; while a layer is held, it is in its place.

    Raises:
        ModelError: as `StreamedModel`; also where layers share tensors.
    """

    def __init__(self, streamed: StreamedModel) -> None:
        self._streamed = streamed
        streamed.check_apart()
        with torch.no_grad():
            self.model = streamed._without_layers()
        self._frame = _Frame(self.model, None)
        self._notes = self._frame.notes()
        self.layers = find_stack(self.model).layers

    @contextmanager
    def holding(self, place: int) -> Iterator[nn.Module]:
        """Within the block layer ``place`` is in memory, and in its place."""
        with torch.no_grad():
            built = self._streamed._built(place, self._streamed._read(place))
        layer = find_stack(built).layers[place]
        with self._frame.holding(place, layer):
            self._frame.recall(self._notes)
            yield layer
        _empty(built)

    @contextmanager
    def with_head(self) -> Iterator[nn.Module]:
        """Within the block the model with its head, and with stubs in place of all layers."""
        with torch.no_grad():
            model = self._streamed._without_layers(head=True)
        yield model
        _empty(model)

    def check_stored(self, place: int, names: Iterable[str]) -> None:
        """See `StreamedModel`."""
        self._streamed.check_stored(place, names)

    def begin(self, batch: Batch) -> Any:
        """What waits for the first layer, for `through`."""
        return self._frame.begin(batch)

    def through(self, place: int, batch: Batch, waiting: Any) -> tuple[Tensor, Any, Any]:
        """Through the layer that is held: its output, how it returned that, and what waits for the next."""
        after = self._frame.through(place, batch, waiting)
        return after.hidden, after.answer, after


class _Stub(nn.Module):
    """Stands for a layer that is not in memory: has its attributes, and hands its input on as the layer would."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["stands_for"] = layer  # not a submodule: its tensors are no part of the model
        self.answer: Callable[[Tensor], Any] = lambda hidden: hidden

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["stands_for"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(hidden_of(args, kwargs))


def _stripped(cls: type[PreTrainedModel], layer: int | None, head: str) -> type[PreTrainedModel]:
    """A class of models that have stubs in place of all but one layer, or in place of the layers and the head."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        _strip(self, layer, head)

    # transformers goes by the name and the module of a class
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**named, "__init__": __init__})


def _strip(model: PreTrainedModel, layer: int | None, head: str) -> None:
    stack = find_stack(model)
    for place, module in enumerate(stack.layers):
        if place != layer:
            stack.layers[place] = _Stub(module)
    if layer is not None:
        _strip_around(model, stack)
    elif head:
        model.set_submodule(head, _Stub(model.get_submodule(head)))
    there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = model.all_tied_weights_keys.items()
    model.all_tied_weights_keys = {target: source for target, source in tied if {target, source} <= there}


def _strip_around(model: nn.Module, stack: Stack) -> None:
    """Leave nothing of ``model`` but the way to the stack's layers, whose modules may fill buffers of theirs."""
    module = model
    for step in stack.path.split("."):
        for name, child in module.named_children():
            if name != step:
                setattr(module, name, _Stub(child))
        module = getattr(module, step)


@dataclass(frozen=True)
class _Waiting:
    """What the layers so far have left for the next one, for one batch."""

    hidden: Tensor
    """The next layer's input; after the last layer its output."""
    answer: Sequence[Any] | None = None
    """All that the last layer returned, where that is more than a state: sparse attention hands on what it chose."""
    written: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    """What layers wrote into the mappings that they are called with: Gemma 4 shares keys and values so."""
    embedded: tuple[Tensor, ...] = ()
    """What the embedding gave, each time it was asked."""

    def to(self, device: torch.device | str) -> _Waiting:
        """The same on another device."""
        return _Waiting(*(_moved(part, device) for part in (self.hidden, self.answer, self.written, self.embedded)))


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)([_moved(item, device) for item in value])
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value


@dataclass
class _Lane:
    """The cuts of one batch that are one so far, and what waits for them."""

    batch: int
    cuts: list[int]
    state: _Waiting

    def parted(self, plans: Sequence[Plan], layer: int) -> Iterator[_Lane]:
        """Those that keep a layer and those that drop it."""
        for gone in (False, True):
            cuts = [cut for cut in self.cuts if (layer in plans[cut].dropped) == gone]
            if cuts:
                yield _Lane(self.batch, cuts, self.state)


class _Frame:
    """A decoder with stubs in place of its layers, of which one at a time is replaced by the layer itself."""

    def __init__(self, model: PreTrainedModel, notes: Notes | None) -> None:
        self._decoder = decoder_of(model)
        self._embedding: nn.Module | None = model.get_input_embeddings()
        self._layers = find_stack(model).layers
        self._answer: Sequence[Any] | None = None
        for stub in self._layers:
            stub.answer = self._answered
        inside = {id(tensor) for tensor in (*self._decoder.parameters(), *self._decoder.buffers())}
        _free(tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in inside)
        if notes is not None:
            self.recall(notes)

    def _answered(self, hidden: Tensor) -> Any:
        """How the stubs answer: as the layer before the one that is there."""
        return with_output(self._answer, hidden)

    @contextmanager
    def holding(self, place: int, layer: nn.Module) -> Iterator[None]:
        """Within the block ``layer`` is in its place."""
        stub = self._layers[place]
        self._layers[place] = layer
        try:
            yield
        finally:
            self._layers[place] = stub

    def notes(self) -> Notes:
        """What the modules remember of the batches so far, as a rotary table the greatest length."""
        return [
            ({name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}, dict(module._buffers))
            for module in self._outside_layers()
        ]

    def recall(self, notes: Notes) -> None:
        """Go back to `notes`, so that a layer meets the batches in the state in which a pass in memory would."""
        for module, (plain, buffers) in zip(self._outside_layers(), notes, strict=True):
            vars(module).update(plain)
            module._buffers.update(buffers)

    def _outside_layers(self) -> list[nn.Module]:
        within = {id(module) for layer in self._layers for module in layer.modules()}
        return [module for module in self._decoder.modules() if id(module) not in within]

    def begin(self, batch: Batch) -> _Waiting:
        """What waits for layer 0."""
        embedded: list[Tensor] = []
        watched = (
            nullcontext()
            if self._embedding is None
            else leaving(self._embedding, lambda output: embedded.append(output.clone()))
        )
        with watched:
            hidden = self._run(batch, 0)
        return _Waiting(hidden, embedded=tuple(embedded))

    def drop_embedding(self) -> None:
        """Free what is often as large as several layers: from now on it gives what it gave in `begin`.

        Copies of it, since a decoder may scale them in place.
        """
        if self._embedding is None:
            return
        _free(self._embedding.parameters())
        self._embedding.__dict__["forward"] = lambda *args, **kwargs: next(self._embedded).clone()

    def through(self, place: int, batch: Batch, waiting: _Waiting) -> _Waiting:
        """What waits after layer ``place``."""
        self._answer, self._embedded = waiting.answer, iter(waiting.embedded)
        written = dict(waiting.written)
        before: dict[str, dict[Any, Any]] = {}
        calls: list[nn.Module] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            calls.append(module)
            for name, value in kwargs.items():
                if isinstance(value, MutableMapping):
                    value.update(written.get(name, {}))
                    before[name] = dict(value)
            return with_hidden(args, kwargs, waiting.hidden)

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._answer = with_output(output, None) if isinstance(output, (tuple, list)) else None
            for name, old in before.items():
                new = {key: value for key, value in kwargs[name].items() if old.get(key) is not value}
                if new:
                    written[name] = {**written.get(name, {}), **new}

        layer = self._layers[place]
        with ExitStack() as hooks:
            hooks.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(leave, with_kwargs=True).remove)
            hidden = self._run(batch, place + 1)
        if len(calls) != 1:  # the state would have gone by the layer, or through it twice
            raise not_run_once(place, len(calls))
        return _Waiting(hidden, self._answer, written, waiting.embedded)

    def _run(self, batch: Batch, until: int) -> Tensor:
        """The input of layer ``until``, or the output of the last, in a pass that ends there."""
        caught: list[Tensor] = []

        def stop(hidden: Tensor) -> None:
            caught.append(hidden)
            raise _Enough

        layers = self._layers
        watched = entering(layers[until], stop) if until < len(layers) else leaving(layers[-1], stop)
        with suppress(_Enough), watched:
            run_decoder(self._decoder, batch)
        if not caught:
            raise not_run_once(until, 0)
        return caught[0]


def _taken(take: Take, place: int, waiting: _Waiting) -> _Waiting:
    """``waiting`` on the CPU, after ``take`` has had its state."""
    take(place, waiting.hidden)
    return waiting.to("cpu")


def _head_of(model: PreTrainedModel) -> str:
    """The path of the language-model head; empty where there is none, or where it is the embedding itself."""
    head = model.get_output_embeddings()
    return "" if head is None or head is model.get_input_embeddings() else _path_of(head, model)


def _path_of(part: nn.Module, model: nn.Module) -> str:
    return next((path for path, module in model.named_modules() if module is part), "")


def _return_freed_memory() -> None:
    """Have glibc map every large block by itself, so that a freed layer leaves the process at once.

    Left alone, it learns from the first freed layer to keep such blocks in its heap, which then holds three or four.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


def _empty(model: nn.Module) -> None:
    """Give the weights back now: models refer to themselves, so that Python alone would keep them for a while."""
    _free((*model.parameters(), *model.buffers()))


def _free(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        tensor.data = torch.empty(0, dtype=tensor.dtype)
