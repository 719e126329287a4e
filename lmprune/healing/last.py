"""The last layer solved for what the whole model says: its distribution over the next token, not its state.

Behind the last layer stand a norm and the head alone, so that its error need not be measured on states, where all
directions count alike: what counts is the cross-entropy from the whole model's distribution. In what the layer's last
projection writes that is a multinomial logistic regression on its features, which has no closed form; it is solved by
a few steps of L-BFGS, from the least squares, and what does best on held-out text is kept. No gradient goes further
than this layer, and no token of the text is a label. By lmprune.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmprune.forward.batches import Batch
from lmprune.healing.layerwise import Layerwise
from lmprune.healing.writers import Writer

ROUNDS = 6
"""Of steps, each judged on held-out text."""
STEPS = 4
"""Of L-BFGS, in one round."""
TOKENS = 131072
LOGITS = {"cpu": 1 << 29, "cuda": 1 << 33}
"""At most so many tokens are used, and so many logits, by device."""
LEAST = 4096
"""Fewer tokens than that are too few to solve and to judge by: vocabularies beyond `LOGITS` / `LEAST` are left out."""
INPUT_BYTES = 1 << 31
"""What enters the projection, and the states beside it, of the tokens that are used: they wait in memory."""
KEPT_BYTES = 1 << 30
"""The whole model's distributions that fit are kept from one step to the next; others are computed again."""
_AT_ONCE = 1 << 25
"""Logits at a time."""
_GAIN = 1e-3
"""A round that gains less than this share of what is left is the last."""


@dataclass(frozen=True)
class _Part:
    """Some samples: what enters the projection, the state until then, and what leaves the whole model's last layer."""

    batch: Batch
    entered: Tensor
    before: Tensor
    wanted: Tensor


@dataclass(frozen=True)
class Solved:
    """What became of it: the Kullback-Leibler divergence from the whole model on held-out text, in nats a token."""

    before: float
    after: float
    tokens: int


def room(vocabulary: int, device: torch.device) -> int:
    """How many tokens may be used; 0 where they would be too few."""
    tokens = min(TOKENS, LOGITS.get(device.type, LOGITS["cpu"]) // vocabulary)
    return tokens if tokens >= LEAST else 0


class Last:
    """The last projection of a student's last layer, and the whole model, which has passed its own last layer.

    Args:
        inputs: for each batch what enters the projection and the state until then, (samples, length, ...).
        held: for each batch whether it is held out.
    """

    def __init__(
        self,
        student: Layerwise,
        whole: Layerwise,
        writer: Writer,
        inputs: Iterable[tuple[Tensor, Tensor]],
        batches: Sequence[Batch],
        held: Sequence[bool],
    ) -> None:
        self._student, self._whole, self._writer = student, whole, writer
        self._layer = student.layers[len(student.layers) - 1]
        self._device = next(self._layer.parameters()).device
        self._vocabulary = int(whole.model.config.get_text_config().vocab_size)
        wide = writer.linear(self._layer).weight.numel() // whole.states[0].shape[-1] + 2 * whole.states[0].shape[-1]
        tokens = min(room(self._vocabulary, self._device), INPUT_BYTES // (4 * wide))
        chosen = [
            _spread([n for n, part in enumerate(held) if part == wanted], batches, size)
            for wanted, size in ((False, tokens * 4 // 5), (True, tokens // 5))
        ]
        found = {n: each for n, each in enumerate(inputs) if n in (*chosen[0], *chosen[1])}
        self._fit, self._held = (
            [part for n in numbers for part in self._parts(batches[n], *found[n], whole.states[n])]
            for numbers in chosen
        )
        self._room = KEPT_BYTES
        self._known: dict[int, Tensor] = {}

    def _parts(self, batch: Batch, entered: Tensor, before: Tensor, wanted: Tensor) -> Iterator[_Part]:
        """A batch in parts that are not too large at a time."""
        size = max(1, _AT_ONCE // (self._vocabulary * batch.ids.shape[1]))
        for at in range(0, len(batch.ids), size):
            rows = slice(at, at + size)
            mask = None if batch.mask is None else batch.mask[rows]
            part = Batch(batch.ids[rows], batch.lengths[rows], mask)
            yield _Part(part, entered[rows], before[rows], wanted[rows])

    def solve(self) -> Solved:
        """Change the projection in place, for the better or not at all."""
        known = dict(self._layer.named_parameters())
        parameters = [known[name] for name in self._writer.changed(self._layer)]
        asked = [parameter.requires_grad for parameter in parameters]
        with self._student.heading() as ours, self._whole.heading() as theirs:
            self._ours, self._theirs = ours, theirs
            least = self._entropy(self._held)
            before = best = self._crossed(self._held)
            kept = [parameter.detach().clone() for parameter in parameters]
            for parameter in parameters:
                parameter.requires_grad_(True)
            solver = torch.optim.LBFGS(
                parameters, max_iter=STEPS, history_size=ROUNDS * STEPS, line_search_fn="strong_wolfe"
            )
            pulled = _Remembered(lambda: self._pulled(parameters), parameters)
            for _ in range(ROUNDS):
                solver.step(pulled)
                now = self._crossed(self._held)
                gained = best - now > _GAIN * (best - least)
                if now < best:
                    best, kept = now, [parameter.detach().clone() for parameter in parameters]
                if not gained:
                    break
        with torch.no_grad():
            for parameter, value, was in zip(parameters, kept, asked):
                parameter.copy_(value)
                parameter.requires_grad_(was)
                parameter.grad = None
        return Solved(before - least, best - least, _tokens(self._fit) + _tokens(self._held))

    def _pulled(self, parameters: Sequence[Tensor]) -> Tensor:
        """The cross-entropy on the text to fit on, with its gradients."""
        for parameter in parameters:
            parameter.grad = None
        tokens, total = _tokens(self._fit), 0.0
        for part in self._fit:
            with torch.enable_grad():
                crossed = self._cross(part) / tokens
                crossed.backward()
            total += float(crossed.detach())
        return torch.tensor(total)

    @torch.no_grad()
    def _crossed(self, parts: Sequence[_Part]) -> float:
        return sum(float(self._cross(part)) for part in parts) / _tokens(parts)

    @torch.no_grad()
    def _entropy(self, parts: Sequence[_Part]) -> float:
        """Of the whole model's distributions: the least that the cross-entropy can be."""
        return sum(float(torch.special.entr(self._target(part)).sum()) for part in parts) / _tokens(parts)

    @torch.no_grad()
    def _target(self, part: _Part) -> Tensor:
        """The whole model's distributions, (tokens, vocabulary)."""
        if id(part) in self._known:
            return self._known[id(part)]
        found = part.batch.real(self._theirs(part.batch, part.wanted)).float().softmax(-1)
        if self._room >= found.nbytes:
            self._room -= found.nbytes
            self._known[id(part)] = found
        return found

    def _cross(self, part: _Part) -> Tensor:
        added = self._writer.adds(self._layer, part.entered.to(self._device))
        made = part.before.to(self._device) + added.view_as(part.before)
        found = part.batch.real(self._ours(part.batch, made)).float().log_softmax(-1)
        crossed: Tensor = -(self._target(part).to(found) * found).sum()
        return crossed


class _Remembered:
    """A function of ``parameters`` that leaves gradients: not computed again where it was computed last.

    Each call of a solver's step asks first for what the call before it ended with.
    """

    def __init__(self, compute: Callable[[], Tensor], parameters: Sequence[Tensor]) -> None:
        self._compute, self._parameters = compute, parameters
        self._at: list[Tensor] = []
        self._gradients: list[Tensor | None] = []
        self._found = torch.tensor(0.0)

    def __call__(self) -> Tensor:
        parameters = self._parameters
        if self._at and all(map(torch.equal, self._at, parameters)):
            for parameter, gradient in zip(parameters, self._gradients):
                parameter.grad = gradient
            return self._found
        self._found = self._compute()
        self._at = [parameter.detach().clone() for parameter in parameters]
        self._gradients = [parameter.grad for parameter in parameters]
        return self._found


def _tokens(parts: Sequence[_Part]) -> int:
    return sum(int(part.batch.lengths.sum()) for part in parts)


def _spread(numbers: Sequence[int], batches: Sequence[Batch], tokens: int) -> list[int]:
    """Some of the batches, spread evenly, that have about so many tokens together; one at least."""
    whole = sum(int(batches[number].lengths.sum()) for number in numbers)
    count = min(len(numbers), max(1, round(len(numbers) * tokens / max(1, whole))))
    return [numbers[place * len(numbers) // count] for place in range(count)]


def kept_weights(modules: Sequence[Any]) -> list[list[Tensor]]:
    """Copies of all parameters of each module, to be put back."""
    return [[parameter.detach().clone() for parameter in module.parameters()] for module in modules]


def put_back(modules: Sequence[Any], kept: Sequence[Sequence[Tensor]]) -> None:
    """What `kept_weights` gave."""
    with torch.no_grad():
        for module, values in zip(modules, kept):
            for parameter, value in zip(module.parameters(), values):
                parameter.copy_(value)
