"""How a decoder layer is called and what it hands on: the one place that knows.

A layer is given its hidden state first or by the name ``hidden_states``, and gives one back by itself or first in a
tuple. All that watches layers, replaces what enters them, or stands in for them goes through the context managers
here, which leave nothing behind.

``entering(layer, take)``        ``take(x)`` gets each input of the layer
``entering_any(module, take)``   the same of a module that need not be a layer
``calling(module, take)``        ``take(arguments)``, all of them
``leaving(layer, take)``         ``take(y)`` gets each output
``watching(layers, take)``       both, for a whole stack: ``take(place, x)``
``changing(layer, change)``      the layer gets ``change(x)`` in place of its input
``given(layer, hidden)``         the layer gets ``hidden`` in place of it
``standing_in(layer, answer)``   the layer computes nothing and returns ``answer``
``computing(layer, compute)``    the layer returns ``compute(its own forward, args, kwargs)``
``skipping(model, layers)``      the layers hand their input on
``generating(model, **how)``     ``model.generate`` goes by ``how`` alone
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lmprune.errors import ModelError
from lmprune.forward.batches import Batch
from lmprune.models.stack import find_stack, unwrapped

Take = Callable[[int, Tensor], None]
"""Gets the number of a state, and the state."""

# --- what a layer is given and gives back -----------------------------------------------------------------------------


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state among a layer's arguments.

    Raises:
        ModelError: there is none.
    """
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise ModelError(f"a layer is called with {', '.join(kwargs) or 'nothing'}: none of these is its hidden state")
    return hidden


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments with another hidden state."""
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def output_of(output: Any) -> Tensor:
    """The hidden state that a layer returns, by itself or first in a tuple.

    Raises:
        ModelError: there is none.
    """
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(hidden, Tensor):
        raise ModelError(f"a layer returns {type(output).__name__}, which holds no hidden state")
    return hidden


def with_output(output: Any, hidden: Tensor | None) -> Any:
    """What a layer returns, with another hidden state."""
    return type(output)([hidden, *output[1:]]) if isinstance(output, (tuple, list)) else hidden


def check_state(hidden: Tensor, batch: Batch) -> None:
    """Whether there is one state for every token: DeepSeek V4 has several, CPM-Ant adds tokens, XLNet puts them first.

    Raises:
        ModelError: there is not.
    """
    if hidden.dim() != 3 or hidden.shape[:2] != batch.ids.shape:
        samples, tokens = batch.ids.shape
        raise ModelError(
            f"the layers of this model pass on a state of shape {list(hidden.shape)} for {samples} samples of {tokens} "
            "tokens and not (samples, tokens, width): there is no one state to measure. Use --layers or --criterion "
            "deepest"
        )


def not_run_once(layer: int, times: int) -> ModelError:
    """A layer that the decoder passes by, as Mllama's cross-attention on text alone, or comes to again."""
    runs = f"{times} times" if times else "never"
    return ModelError(
        f"on text the decoder runs layer {layer} {runs} and not once: there is no one state to measure. "
        "Use --layers or --criterion deepest"
    )


# --- watching and replacing -------------------------------------------------------------------------------------------


@contextmanager
def _hooked(register: Callable[..., RemovableHandle], hook: Callable[..., Any]) -> Iterator[None]:
    handle = register(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def entering(layer: nn.Module, take: Callable[[Tensor], object]) -> AbstractContextManager[None]:
    """Within the block, ``take`` gets the hidden state of each call of ``layer``."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(hidden_of(args, kwargs))

    return _hooked(layer.register_forward_pre_hook, hook)


def entering_any(module: nn.Module, take: Callable[[Tensor], object]) -> AbstractContextManager[None]:
    """Within the block ``take`` gets the first argument of each call of ``module``, which need not be a layer."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(args[0] if args else next(iter(kwargs.values())))

    return _hooked(module.register_forward_pre_hook, hook)


def calling(module: nn.Module, take: Callable[[Sequence[Any]], object]) -> AbstractContextManager[None]:
    """Within the block ``take`` gets all arguments of each call of ``module``, in the order of its parameters."""
    known = inspect.signature(module.forward)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(tuple(known.bind(*args, **kwargs).arguments.values()))

    return _hooked(module.register_forward_pre_hook, hook)


def leaving(layer: nn.Module, take: Callable[[Tensor], object], *, whole: bool = False) -> AbstractContextManager[None]:
    """Within the block, ``take`` gets the hidden state that each call of ``layer`` returns.

    With ``whole`` it gets all that is returned, which may be a tuple.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        take(output if whole else output_of(output))

    return _hooked(layer.register_forward_hook, hook)


@contextmanager
def watching(layers: Sequence[nn.Module] | nn.ModuleList, take: Take) -> Iterator[None]:
    """Within the block, ``take(l, x)`` gets the input of every layer l and ``take(L, x)`` the output of the last.

    That output is the state before the final norm; HF's ``hidden_states[-1]`` is the one after it.
    """
    with ExitStack() as hooks:
        for place, layer in enumerate(layers):
            hooks.enter_context(entering(layer, partial(take, place)))
        hooks.enter_context(leaving(layers[-1], partial(take, len(layers))))
        yield


def changing(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
    """Within the block, ``layer`` gets what ``change`` makes of the state that it is called with."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return with_hidden(args, kwargs, change(hidden_of(args, kwargs)))

    return _hooked(layer.register_forward_pre_hook, hook)


def given(layer: nn.Module, hidden: Tensor) -> AbstractContextManager[None]:
    """Within the block, ``layer`` gets ``hidden`` in place of the state that it is called with."""
    return changing(layer, lambda _: hidden)


def standing_in(layer: nn.Module, answer: Any) -> AbstractContextManager[None]:
    """Within the block, ``layer`` computes nothing and returns ``answer``; its attributes stay in sight."""
    return computing(layer, lambda honest, args, kwargs: answer)


@contextmanager
def computing(layer: nn.Module, compute: Callable[..., Any]) -> Iterator[None]:
    """Within the block, ``layer`` returns ``compute(forward, args, kwargs)`` of its own forward and its arguments."""
    before, honest = layer.__dict__.get("forward"), layer.forward  # accelerate puts its own there
    layer.__dict__["forward"] = lambda *args, **kwargs: compute(honest, args, kwargs)
    try:
        yield
    finally:
        del layer.__dict__["forward"]
        if before is not None:
            layer.__dict__["forward"] = before


@contextmanager
def skipping(model: nn.Module, layers: Iterable[int]) -> Iterator[None]:
    """Within the block, the given layers hand their hidden state on unchanged."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return with_output(output, hidden_of(args, kwargs))

    stack = find_stack(model)
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(_hooked(stack.layers[layer].register_forward_hook, hook))
        yield


# --- the decoder around the layers ------------------------------------------------------------------------------------


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
def generating(model: Any, **how: Any) -> Iterator[None]:
    """Within the block ``model.generate`` goes by ``how``, and by nothing that its makers set, such as penalties.

    What is handed to `generate` itself, transformers fills up from the model's own settings.
    """
    from transformers import GenerationConfig

    inner = unwrapped(model)
    before, inner.generation_config = inner.generation_config, GenerationConfig(**how)
    try:
        yield
    finally:
        inner.generation_config = before


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
