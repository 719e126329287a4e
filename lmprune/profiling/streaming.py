"""The states of a model that is read layer by layer, for models larger than memory.

Every layer is run inside a model of that one layer, which transformers builds, fills and calls: masks, rotary tables
and fused weights are its own. Only the layer's input is replaced, by the state that waits in memory. The batches are
those of a pass in memory, so the values are the same bit for bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from lmprune.errors import ModelError
from lmprune.models.checkpoint import Checkpoint, TensorEntry, layer_prefix, renamed
from lmprune.models.fields import PER_LAYER, layer_count, pruned_config
from lmprune.models.loading import load_config, model_class
from lmprune.models.stack import find_stack
from lmprune.profiling.memory import decoder_fields
from lmprune.profiling.statistics import Batch, Collector, Values, collector
from lmprune.profiling.watching import Rows, decoder_of, hidden_of, output_of, run_decoder

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_TINY_VOCABULARY = 8
_M_MMAP_THRESHOLD = -3
"""glibc's number for the size from which a block is mapped by itself (mallopt(3))."""
_LARGE = 1 << 18
_NOT_ALONE = ("num_kv_shared_layers", "hidden_size_per_layer_input")
"""Fields by which a layer needs more than its input: the keys of another layer, an embedding of its own."""


_MORE_THAN_ITS_INPUT = {
    "cpmant": "a position bias that is made of the ids",
    "gemma4": "what the whole stack prepares for it",
    "gemma4_text": "what the whole stack prepares for it",
    "gemma4_unified": "what the whole stack prepares for it",
    "gemma4_unified_text": "what the whole stack prepares for it",
}
"""Types whose layers, run alone, are measured to give other values: what they need besides their input."""


class _Enough(Exception):
    """Leaves a forward pass once the state that was wanted is there."""


class StreamedModel:
    """Measures batches of rows on the model in ``folder``, of which two layers are in memory at a time.

    Raises:
        ModelError: a layer of this architecture cannot run by its input alone.
    """

    def __init__(self, folder: Path, token: str, *, dtype: str, device: torch.device, at_once: int) -> None:
        self._config = load_config(folder)
        raw = self._config.to_dict()
        inner = decoder_fields(raw)
        needy = next((name for name in _NOT_ALONE if inner.get(name)), None)
        if needy is not None:
            raise ModelError(f"--stream: with {needy} = {inner[needy]}, layers need one another. Use --no-stream")
        kind = self._config.model_type
        if kind in _MORE_THAN_ITS_INPUT:
            raise ModelError(f"--stream: a layer of {kind} needs {_MORE_THAN_ITS_INPUT[kind]}. Use --no-stream")
        self._class = model_class(self._config)
        self._dtype = self._config.dtype or "auto" if dtype == "auto" else getattr(torch, dtype)
        self._device = device
        self._token = token
        self._checkpoint = Checkpoint.open(folder)
        self.layers = layer_count(raw)
        self._prefix = layer_prefix(self._checkpoint.tensors, self.layers)
        self.at_once = at_once

    def measure(self, batches: Sequence[Rows]) -> list[Values]:
        """The values of each batch's rows, in order: every layer is read once and run on all batches."""
        if not batches:
            return []
        _return_freed_memory()
        with torch.no_grad(), ThreadPoolExecutor(1) as reader:
            on_device = [Batch.of(rows, self._device) for rows in batches]
            collectors = [collector(self._token, self.layers) for _ in batches]
            for each, batch in zip(collectors, on_device):
                each.begin(batch)
            states = self._embedded(on_device, collectors)
            waiting = reader.submit(self._read, 0)
            for layer in range(self.layers):
                model = self._one_layer(layer, waiting.result())
                if layer + 1 < self.layers:
                    waiting = reader.submit(self._read, layer + 1)
                for place, batch in enumerate(on_device):
                    output = _through_layer(model, batch, states[place].to(self._device))
                    collectors[place].take(layer + 1, output)
                    states[place] = output.cpu()
                _empty(model)
            return [each.values() for each in collectors]

    def _embedded(self, batches: list[Batch], collectors: list[Collector]) -> list[Tensor]:
        """State 0 of every batch, computed by the model's own beginning; its weights are dropped again."""
        entries = {name: e for name, e in self._checkpoint.tensors.items() if not name.startswith(self._prefix + ".")}
        config = self._config_of(0)
        config.tie_word_embeddings = True  # so that no head is made, which the states do not need
        entries = {name: entry for name, entry in entries.items() if name not in self._head_names()}
        model = self._built(config, _read_all(entries) | self._read(0))
        states = []
        for batch, each in zip(batches, collectors):
            hidden = _before_first_layer(model, batch)
            each.take(0, hidden)
            states.append(hidden.cpu())
        _empty(model)
        return states

    def _head_names(self) -> set[str]:
        with torch.device("meta"):
            model = self._class(self._config_of(0, tiny=True))
        head = model.get_output_embeddings()
        path = next((path for path, module in model.named_modules() if module is head), None)
        return {f"{path}.weight", f"{path}.bias"} if path else set()

    def _read(self, layer: int) -> dict[str, Tensor]:
        """The tensors of one layer, under the names they have in a model of that layer alone."""
        names = renamed(self._checkpoint.tensors, self._prefix, (layer,), self.layers)
        wanted = {new: old for old, new in names.items() if new.startswith(f"{self._prefix}.0.")}
        return _read_all({new: self._checkpoint.tensors[old] for new, old in wanted.items()})

    def _config_of(self, layer: int, *, tiny: bool = False) -> Any:
        """The config of a model of one layer; ``tiny`` leaves it next to no embeddings."""
        data = pruned_config(self._config.to_dict(), (layer,))
        if tiny:
            inner = decoder_fields(data)
            assert isinstance(inner, dict)
            inner |= {"vocab_size": _TINY_VOCABULARY, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
        config = type(self._config).from_dict(data)
        self._refuse_another_layer(decoder_fields(data), decoder_fields(config.to_dict()), layer)
        return config

    def _refuse_another_layer(self, asked: Mapping[str, Any], got: Mapping[str, Any], layer: int) -> None:
        """Some configs overrule what they are given: a model of one layer would then hold a layer of another kind."""
        for name in PER_LAYER:
            if _plain(asked.get(name)) != _plain(got.get(name)):
                raise ModelError(
                    f"--stream: {self._config.model_type} makes layer {layer} another one when it stands alone "
                    f"({name} becomes {got.get(name)}). Use --no-stream"
                )

    def _one_layer(self, layer: int, tensors: dict[str, Tensor]) -> nn.Module:
        return self._built(self._config_of(layer, tiny=True), tensors)

    def _built(self, config: Any, tensors: Mapping[str, Tensor]) -> nn.Module:
        with _without_report():
            model, info = self._class.from_pretrained(
                None, config=config, state_dict=dict(tensors), dtype=self._dtype, output_loading_info=True
            )
        lacking = [name for name in info["missing_keys"] if name.startswith(f"{self._prefix}.0.")]
        for key, found in (("missing", lacking), ("unexpected", info["unexpected_keys"])):
            if found:
                raise ModelError(
                    f"{self._checkpoint.folder} does not fit its config: {key} tensor {sorted(found)[0]!r}"
                )
        built: nn.Module = model.eval().to(self._device)
        return built


@contextmanager
def _without_report() -> Iterator[None]:
    """Within the block transformers does not report what is missing: all but a layer is, on purpose, every time."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _before_first_layer(model: nn.Module, batch: Batch) -> Tensor:
    """The input of layer 0."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(hidden_of(args, kwargs))
        raise _Enough

    stack = find_stack(model)
    handle = stack.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        run_decoder(decoder_of(model), batch)
    except _Enough:
        pass
    finally:
        handle.remove()
    return caught[0]


def _through_layer(model: nn.Module, batch: Batch, state: Tensor) -> Tensor:
    """The output of the only layer of ``model`` for the input ``state``."""
    caught: list[Tensor] = []

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})

    def catch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        caught.append(output_of(output))
        raise _Enough

    stack = find_stack(model)
    layer = stack.layers[0]
    hooks = (layer.register_forward_pre_hook(replace, with_kwargs=True), layer.register_forward_hook(catch))
    try:
        # The ids count for nothing, as the state takes the place of their embeddings, but give the batch its shape.
        run_decoder(decoder_of(model), Batch(torch.zeros_like(batch.ids), batch.lengths, batch.mask))
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return caught[0]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _return_freed_memory() -> None:
    """Have glibc map every large block by itself, so that a freed layer leaves the process at once.

    Left alone, it learns from the first freed layer to keep such blocks in its heap, which then holds three or four.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


def _empty(model: nn.Module) -> None:
    """Give the weights back now: models refer to themselves, so that Python alone would keep them for a while."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype)


def _read_all(entries: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
    return {name: _read_tensor(entry) for name, entry in entries.items()}


def _read_tensor(entry: TensorEntry) -> Tensor:
    """One tensor, read and not mapped: mapped pages would count as memory for as long as the system likes."""
    if entry.dtype not in _TYPES:
        raise ModelError(f"{entry.file} holds tensors of type {entry.dtype}, which --stream cannot read")
    content = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        if len(content) and file.readinto(memoryview(content.numpy())) != len(content):
            raise ModelError(f"{entry.file} is truncated. Download it again")
    return content.view(_TYPES[entry.dtype]).reshape(entry.shape)
