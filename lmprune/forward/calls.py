"""The states of a live model, taken by hooks while its decoder runs, and nothing left behind."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lmprune.errors import ModelError
from lmprune.forward.memory import out_of_memory
from lmprune.models.stack import find_stack
from lmprune.profiling.statistics import Batch, Values, collector

Rows = list[NDArray[np.int32]]
Say = Callable[[str], None]
Take = Callable[[int, Tensor], None]


class LiveModel:
    """Measures batches of rows on a model that is in memory."""

    def __init__(self, model: nn.Module, token: str, say: Say) -> None:
        self._model = model
        self._stack = find_stack(model)
        self._decoder = decoder_of(model)
        self._collector = collector(token, len(self._stack.layers))
        self._most: int | None = None  # samples that memory has room for, once it has run out
        self._say = say
        self.layers = len(self._stack.layers)
        self.at_once = 1

    def measure(self, batches: Sequence[Rows]) -> list[Values]:
        """The values of each batch's rows, in order.

        Raises:
            ModelError: memory runs out even for a single sample.
        """
        with evaluating(self._model), torch.no_grad():
            return [np.concatenate([self._measured(part) for part in self._parts(rows)]) for rows in batches]

    def _parts(self, rows: Rows) -> Iterator[Rows]:
        while rows:
            part, rows = rows[: self._most], rows[self._most :] if self._most else []
            yield part

    def _measured(self, rows: Rows) -> Values:
        try:
            return self._forward(rows)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as exc:
            if not out_of_memory(exc):
                raise
            if len(rows) == 1:
                raise ModelError(
                    f"out of memory with one sample of {len(rows[0])} tokens. Use --stream, --quantization nf4 or a "
                    "smaller --max-length"
                ) from exc
        # Outside the except block: the exception's traceback would keep the memory of the failed pass alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._most = len(rows) // 2
        self._say(f"out of memory with {len(rows)} samples in a batch: going on with {self._most}")
        return np.concatenate([self._measured(part) for part in self._parts(rows)])

    def _forward(self, rows: Rows) -> Values:
        batch = Batch.of(rows, input_device(self._decoder))
        self._collector.begin(batch)
        with watching(self._stack.layers, self._collector.take):
            run_decoder(self._decoder, batch)
        return self._collector.values()


def decoder_of(model: nn.Module) -> nn.Module:
    """The module whose forward runs the decoder stack and nothing more: no head, no other tower."""
    owner = find_stack(model).owner
    # An encoder's stack, as BERT's, takes embeddings; the model around it makes them.
    takes_ids = "input_ids" in inspect.signature(owner.forward).parameters
    return owner if takes_ids else getattr(model, "base_model", owner)


def run_decoder(decoder: nn.Module, batch: Batch) -> Any:
    """One forward pass without a cache."""
    known = inspect.signature(decoder.forward).parameters
    given: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False}
    return decoder(**{name: value for name, value in given.items() if name in known})


def input_device(decoder: nn.Module) -> torch.device:
    """Where the decoder wants its ids."""
    embedding = decoder.get_input_embeddings() if hasattr(decoder, "get_input_embeddings") else decoder
    hook = getattr(embedding, "_hf_hook", None)  # accelerate: the weights may rest elsewhere than they are used
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(device)
    return next(embedding.parameters()).device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block ``model`` is in eval mode, which also turns gradient checkpointing off; then as before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def watching(layers: nn.ModuleList, take: Take) -> Iterator[None]:
    """Within the block, ``take(l, x)`` gets the input of every layer l and ``take(L, x)`` the output of the last.

    That output is the state before the final norm; HF's ``hidden_states[-1]`` is the one after it.
    """
    with ExitStack() as hooks:
        for place, layer in enumerate(layers):
            handle = layer.register_forward_pre_hook(partial(_before, place, take), with_kwargs=True)
            hooks.callback(handle.remove)
        hooks.callback(layers[-1].register_forward_hook(partial(_after, len(layers), take)).remove)
        yield


def _before(place: int, take: Take, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    take(place, hidden_of(args, kwargs))


def _after(place: int, take: Take, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    take(place, output_of(output))


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state among a layer's arguments."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise ModelError(f"a layer is called with {', '.join(kwargs) or 'nothing'}: none of these is its hidden state")
    return hidden


def output_of(output: Any) -> Tensor:
    """The hidden state that a layer returns, by itself or first in a tuple."""
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(hidden, Tensor):
        raise ModelError(f"a layer returns {type(output).__name__}, which holds no hidden state")
    return hidden
