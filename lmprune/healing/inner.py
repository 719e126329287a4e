"""What an MLP reads, solved for what it should write: nonlinear least squares of one layer, by Gauss-Newton.

`refit` solves what a layer writes from its own features. Before a cut these are the features of one layer, where those
of several are wanted. Here the maps that make them, such as `gate_proj` and `up_proj`, are solved as well, for the same
target: the MLP is linearised in their weights, and the least squares of that are solved by conjugate gradients with a
Kronecker-factored preconditioner (Martens & Grosse 2015, arXiv 1503.05671). A few iterations are no exact solution,
which keeps the weights near to where they were. No gradient goes through the model, and nothing is learnt from tokens:
all that is fitted is the state that the whole model has there. By lmprune.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from transformers.pytorch_utils import Conv1D

from lmprune.forward.calls import entering_any, leaving
from lmprune.healing.layerwise import Layerwise, close
from lmprune.healing.solving import share
from lmprune.healing.writers import Stage, Writer, is_linear
from lmprune.models.stack import unwrapped

Parts = Callable[[], Iterator[tuple[bool, Tensor, Tensor]]]
"""For each batch: whether it is held out, what enters the MLP (tokens, width), and what it should add to the stream."""
ITERATIONS = 12
"""Of conjugate gradients, in one linearisation."""
_JUDGED = (4, 8, 12)
"""Iterations after which the step so far is tried on held-out text."""
_CURVED = 4
"""Each fourth batch gives the curvature; the gradient is of all."""
_DAMPING = 1e-3
"""Of the linearised least squares, in units of the preconditioner."""


@dataclass(frozen=True)
class Inner:
    """The maps within an MLP that come before the one at its end.

    Attributes:
        path: of the MLP in its layer.
        names: of the maps in the MLP.
        writer: the map at its end.
    """

    path: str
    names: tuple[str, ...]
    writer: Writer

    @property
    def changed(self) -> list[str]:
        """The parameters that a solve changes, by their names in the layer."""
        return [f"{self.path}.{name}.weight" for name in self.names]


@torch.no_grad()
def inner_of(model: Layerwise, place: int, hidden: Tensor, stage: Stage) -> Inner | None:
    """What can be solved within the MLP of a ``stage`` of layer ``place``; None where nothing can.

    Found by trying: the module around the writer takes one state, gives what the writer makes, and sees each token by
    itself.

    Args:
        hidden: as of `lmprune.healing.writers.stages_of`.
    """
    writer = stage.writers[0]
    path = writer.path.rpartition(".")[0]
    if not stage.plain or writer.experts or not path:
        return None
    layer = model.layers[place]
    block = layer.get_submodule(path)
    maps = [(name, part) for name, part in block.named_modules() if is_linear(part)]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    left: list[Tensor] = []
    entered: dict[str, list[Tensor]] = {name: [] for name, _ in maps}
    with ExitStack() as hooks:
        hook = block.register_forward_pre_hook(lambda _, args, given: calls.append((args, given)), with_kwargs=True)
        hooks.callback(hook.remove)
        hooks.enter_context(leaving(writer.linear(layer), left.append))
        for name, part in maps:
            hooks.enter_context(entering_any(part, entered[name].append))
        model.run(place, model.probe, hidden)
    names = tuple(name for name, part in maps if part is not writer.linear(layer) and _solvable(model, part))
    if len(calls) != 1 or len(left) != 1 or not names or any(len(entered[name]) != 1 for name in names):
        return None
    args, given = calls[0]
    if len(args) != 1 or given or not isinstance(args[0], Tensor) or args[0].dim() != 3:
        return None
    (state,) = args
    if state.shape != hidden.shape or any(entered[name][0].shape[:-1] != state.shape[:-1] for name in names):
        return None
    wanted = left[0].view_as(state)
    for tokens in (slice(None), slice(-1, None)):
        found = block(state[:, tokens])
        if not isinstance(found, Tensor) or not close(found.cpu(), wanted[:, tokens].cpu(), wanted.cpu()):
            return None
    return Inner(path, names, writer)


def _solvable(model: Layerwise, part: Any) -> bool:
    weight = part.weight
    named = unwrapped(model.model).named_parameters(remove_duplicate=False)
    return weight.is_floating_point() and weight.dim() == 2 and sum(each is weight for _, each in named) == 1


class Newton:
    """One MLP's Gauss-Newton steps.

    Args:
        layer: which is changed in place.
        parts: what it sees and should add, divided by nothing: the writer's norm and factor are part of what is solved.
    """

    def __init__(self, layer: nn.Module, inner: Inner, parts: Parts) -> None:
        self._layer, self._inner, self._parts = layer, inner, parts
        self._block = layer.get_submodule(inner.path)
        self._norm = layer.get_submodule(inner.writer.norm) if inner.writer.norm else nn.Identity()
        self._maps: dict[str, Any] = {f"{name}.weight": self._block.get_submodule(name) for name in inner.names}

    @property
    def weights(self) -> dict[str, Tensor]:
        """Those that are solved, by their names in the MLP, as they are."""
        return {name: linear.weight.detach() for name, linear in self._maps.items()}

    def put(self, weights: dict[str, Tensor]) -> None:
        """Change them."""
        with torch.no_grad():
            for name, weight in weights.items():
                self._maps[name].weight.copy_(weight)

    def _adds(self, states: Tensor, weights: dict[str, Tensor]) -> Tensor:
        made = functional_call(self._block, weights, (states[None],))
        added: Tensor = self._inner.writer.factor * self._norm(made)[0]
        return added

    @torch.no_grad()
    def error(self, weights: dict[str, Tensor]) -> float:
        """On held-out text, as a share of what should be added."""
        apart = size = 0.0
        for held, states, wanted in self._parts():
            if held:
                apart += float((wanted - self._adds(states, weights)).double().square().sum())
                size += float(wanted.double().square().sum())
        return share(apart, size)

    @torch.no_grad()
    def step(self) -> bool:
        """One linearisation: change the weights to those of the best step, if one is better; whether one was."""
        weights = self.weights
        gradient, factors = self._gradient(weights)
        best, error = None, self.error(weights)
        for step in self._steps(weights, gradient, factors):
            tried = {name: weight + step[name] for name, weight in weights.items()}
            found = self.error(tried)
            if found < error:
                best, error = tried, found
        if best is not None:
            self.put(best)
        return best is not None

    def _gradient(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, _Factors]]:
        """J'r, a mean over tokens, and what the curvature is like."""
        total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        random = torch.Generator().manual_seed(0)
        factors = {name: _Factors(linear) for name, linear in self._maps.items()}
        tokens = 0
        for number, (states, wanted) in enumerate(self._fitted()):
            made, back = vjp(partial(self._adds, states), weights)
            for name, value in back(wanted - made)[0].items():
                total[name] += value
            tokens += len(states)
            if number % _CURVED == 0:
                noise = torch.randn(made.shape, generator=random).to(made)
                with ExitStack() as hooks:
                    for name, linear in self._maps.items():
                        hooks.enter_context(entering_any(linear, factors[name].see))
                    self._adds(states, {})
                for name, value in back(noise)[0].items():
                    factors[name].scattered += value
        for each in factors.values():
            each.settle()
        return {name: value / tokens for name, value in total.items()}, factors

    def _fitted(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((states, wanted) for held, states, wanted in self._parts() if not held)

    def _curved(self, weights: dict[str, Tensor], along: dict[str, Tensor]) -> dict[str, Tensor]:
        """J'J ``along``, a mean over the tokens that give the curvature."""
        total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        tokens = 0
        for number, (states, _) in enumerate(self._fitted()):
            if number % _CURVED == 0:
                adds = partial(self._adds, states)
                moved = jvp(adds, (weights,), (along,))[1]
                for name, value in vjp(adds, weights)[1](moved)[0].items():
                    total[name] += value
                tokens += len(states)
        return {name: value / tokens for name, value in total.items()}

    def _steps(
        self, weights: dict[str, Tensor], gradient: dict[str, Tensor], factors: dict[str, _Factors]
    ) -> Iterator[dict[str, Tensor]]:
        """Steps of conjugate gradients on the linearised least squares, those that are tried."""
        step = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        left = dict(gradient)
        eased = {name: factors[name].solved(value) for name, value in left.items()}
        along, size = eased, _dot(left, eased)
        for number in range(1, ITERATIONS + 1):
            curved = self._curved(weights, along)
            curved = {name: value + _DAMPING * factors[name].times(along[name]) for name, value in curved.items()}
            bent = _dot(along, curved)
            if not bent > 0 or not size > 0:  # nothing is left to gain
                yield step
                return
            step = {name: value + size / bent * along[name] for name, value in step.items()}
            left = {name: value - size / bent * curved[name] for name, value in left.items()}
            if number in _JUDGED:
                yield step
            eased = {name: factors[name].solved(value) for name, value in left.items()}
            before, size = size, _dot(left, eased)
            along = {name: value + size / before * along[name] for name, value in eased.items()}


class _Factors:
    """What the curvature of one map's weight is like: the second moments of its inputs times what its outputs weigh.

    Attributes:
        scattered: the sum over tokens of J'e for random e of size 1: the squares of its rows are what outputs weigh.
    """

    def __init__(self, linear: Any) -> None:
        self._turned = isinstance(linear, Conv1D)
        weight = linear.weight.detach()
        self.scattered = torch.zeros_like(weight)
        width = weight.shape[0] if self._turned else weight.shape[1]
        self._gram = torch.zeros(width, width, dtype=torch.float64)
        self._tokens = 0

    def see(self, inputs: Tensor) -> None:
        """More of its inputs, (..., d_in)."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        self._gram += (rows.T @ rows).to("cpu", torch.float64)
        self._tokens += len(rows)

    def settle(self) -> None:
        """All is seen."""
        device = self.scattered.device
        gram = self._gram / max(1, self._tokens)
        mean = float(gram.diagonal().mean()) or 1.0
        gram.diagonal().add_(_DAMPING * mean)
        self._moments = gram.float().to(device)
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram)).float().to(device)
        weigh = self._oriented(self.scattered).square().sum(1) / (max(1, self._tokens) * mean * len(gram))
        least = float(weigh.mean()) or 1.0
        self._weigh = (weigh + _DAMPING * least)[:, None]

    def _oriented(self, weight: Tensor) -> Tensor:
        return weight.T if self._turned else weight

    def times(self, weight: Tensor) -> Tensor:
        """The preconditioner times ``weight``."""
        return self._oriented(self._weigh * (self._oriented(weight) @ self._moments))

    def solved(self, weight: Tensor) -> Tensor:
        """Its inverse times ``weight``."""
        return self._oriented(self._oriented(weight) @ self._inverse / self._weigh)


def _dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def kept_weights(linears: Sequence[Any]) -> list[Tensor]:
    """Copies of all parameters of modules, to be put back."""
    return [parameter.detach().clone() for linear in linears for parameter in linear.parameters()]


def put_back(linears: Sequence[Any], kept: Sequence[Tensor]) -> None:
    """What `kept_weights` gave."""
    with torch.no_grad():
        for parameter, value in zip((p for linear in linears for p in linear.parameters()), kept):
            parameter.copy_(value)
