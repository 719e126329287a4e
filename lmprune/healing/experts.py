"""Fused experts: what enters each one's last projection, asked of the module itself, and a solve for each.

transformers keeps the experts of a layer in tensors of three dimensions and calls them with tokens, the numbers of the
experts that each goes to, and what each of these weighs. What an expert feeds its `down_proj` with is had from the
module by putting rows of the identity in that tensor's place, so that no activation function has to be known.

With R what is missing of a token's output and w what its experts weigh, each of them is asked for R / sum(w) more than
it gives: then their weighted sum is right. An expert's tokens count by the square of their weight. The ridge is one for
all experts, in units of the mean over them, so that an expert that few tokens go to stays near its old weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmprune.healing.solving import AROUND, KEEP, Sums, share, solve

_SUMS_BYTES = 1 << 30
"""Sums of experts that are kept at once; with more experts the text is gone through again."""


def are_experts(module: nn.Module) -> bool:
    """Whether it may be a module of fused experts."""
    weight = getattr(module, "down_proj", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 3 and weight.is_floating_point()


def packed(values: Sequence[Any]) -> Tensor | None:
    """What experts are called with as one tensor: tokens, then their experts' numbers and weights; (tokens, d + 2 k).

    None where they are called with something else.
    """
    if len(values) != 3 or not all(isinstance(value, Tensor) and value.dim() == 2 for value in values):
        return None
    tokens, numbers, weights = values
    if numbers.is_floating_point() or numbers.shape != weights.shape or len(tokens) != len(numbers):
        return None
    return torch.cat([tokens, numbers.to(tokens), weights.to(tokens)], dim=1)


class Experts:
    """The experts of a live module, one by one.

    Args:
        width: of the tokens that enter it and of what leaves it.
    """

    def __init__(self, module: nn.Module, width: int) -> None:
        self._module, self.width = module, width
        self._weight: Tensor = module.down_proj.detach()
        bias = getattr(module, "down_proj_bias", None)
        self._bias: Tensor | None = None if bias is None else bias.detach()
        self.count, first, second = self._weight.shape
        self.inner = second if first == width else first
        self._rows_are_outputs = first == width
        if first == second:
            self._rows_are_outputs = self._outputs_come_first()

    @property
    def bias(self) -> bool:
        """Whether each has a bias."""
        return self._bias is not None

    def _outputs_come_first(self) -> bool:
        """Of a square weight: by what it makes of a token."""
        token = torch.randn(1, self.width, generator=torch.Generator().manual_seed(0)).to(self._weight)
        made = self._alone(0, token) - (0 if self._bias is None else self._bias[0])
        inner, weight = self.entering(0, token), self._weight[0]
        return bool((made - inner @ weight.T).norm() < (made - inner @ weight).norm())

    def unpacked(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The parts of `packed`."""
        chosen = (values.shape[-1] - self.width) // 2
        tokens, numbers, weights = values.split([self.width, chosen, chosen], dim=-1)
        return tokens, numbers.round().long(), weights

    def __call__(self, values: Tensor) -> Tensor:
        """What they make of `packed` tokens, (tokens, width)."""
        output: Tensor = self._module(*(part.contiguous() for part in self.unpacked(values)))
        return output

    def _alone(self, number: int, tokens: Tensor) -> Tensor:
        where = torch.full((len(tokens), 1), number, dtype=torch.long, device=tokens.device)
        output: Tensor = self._module(tokens.contiguous(), where, torch.ones_like(tokens[:, :1]))
        return output

    def entering(self, number: int, tokens: Tensor) -> Tensor:
        """What enters that expert's `down_proj` for these tokens, (tokens, inner)."""
        weight, bias = self._weight[number].clone(), None if self._bias is None else self._bias[number].clone()
        unit = torch.eye(self.inner, dtype=weight.dtype, device=weight.device)
        parts = []
        try:
            if self._bias is not None:
                self._bias[number] = 0
            for start in range(0, self.inner, self.width):
                rows = unit[start : start + self.width]
                rows = torch.cat([rows, rows.new_zeros(self.width - len(rows), self.inner)])
                self._put(number, rows.T)
                parts.append(self._alone(number, tokens).clone())
        finally:
            self._weight[number] = weight
            if self._bias is not None and bias is not None:
                self._bias[number] = bias
        return torch.cat(parts, dim=1)[:, : self.inner]

    def weight_of(self, number: int) -> Tensor:
        """As (inner, width), then the bias as one more row, in float64 on the CPU."""
        weight = self._weight[number].to("cpu", torch.float64)
        weight = weight.T if self._rows_are_outputs else weight
        return weight if self._bias is None else torch.cat([weight, self._bias[number].to(weight)[None]])

    def set_weight(self, number: int, weight: Tensor) -> None:
        """Put back what `weight_of` gave, changed."""
        if self._bias is not None:
            weight, bias = weight[:-1], weight[-1]
            self._bias[number] = bias.to(self._bias)
        self._put(number, weight)

    def _put(self, number: int, weight: Tensor) -> None:
        self._weight[number] = (weight.T if self._rows_are_outputs else weight).to(self._weight)


class ExpertsSolver:
    """Solves the `down_proj` of each expert on the tokens that go to it; the router stays."""

    def __init__(
        self,
        experts: Experts,
        parts: Callable[[], Iterator[tuple[bool, Tensor, Tensor]]],
        ridges: Sequence[float],
    ) -> None:
        self._experts, self._parts, self._ridges = experts, parts, ridges

    def solve(self, *, all_text: bool = True) -> tuple[str, float | None, float, float, int]:
        """As `lmprune.healing.refitting.Solver`."""
        experts = self._experts
        old = [experts.weight_of(number) for number in range(experts.count)]
        each = 8 * 2 * (experts.inner + experts.bias) * (experts.inner + experts.width)
        at_once = max(1, _SUMS_BYTES // each)
        before, tokens = self._error(), 0
        sums: list[tuple[Sums, Sums]] = []
        for start in range(0, experts.count, at_once):
            found, tokens = self._sums(range(start, min(start + at_once, experts.count)))
            sums += found
        scale = self._scale([fit for fit, _ in sums])
        best = self._best_ridge(sums, old, scale)
        if best is None:
            return KEEP, None, before, before, tokens
        for number, (fit, _) in enumerate(sums):  # without the held-out text, to be judged on it
            experts.set_weight(number, solve(fit, best, around=old[number], scale=scale))
        after = self._error()
        if not after < before:
            for number, weight in enumerate(old):
                experts.set_weight(number, weight)
            return KEEP, None, before, before, tokens
        if not all_text:
            return AROUND, best, before, after, tokens
        both = [fit + held for fit, held in sums]
        for number, each in enumerate(both):
            experts.set_weight(number, solve(each, best, around=old[number], scale=self._scale(both)))
        return AROUND, best, before, after, tokens

    def _scale(self, sums: Sequence[Sums]) -> float:
        """The unit of the ridge: the mean of the diagonals of all experts' sums."""
        return sum(float(each.gram.diagonal()[: self._experts.inner].mean()) for each in sums) / len(sums)

    def _best_ridge(self, sums: Sequence[tuple[Sums, Sums]], old: Sequence[Tensor], scale: float) -> float | None:
        """That of least error on the held-out tokens of all experts; None where their old weights have the least."""

        def error(ridge: float | None) -> float:
            total = 0.0
            for (fit, held), weight in zip(sums, old):
                found = weight if ridge is None else solve(fit, ridge, around=weight, scale=scale)
                total += held.squared_error(found)
            return total

        return min([None, *self._ridges], key=error)

    def _error(self) -> float:
        """The squared error of what all write, as a share of the squares of what they should, on held-out text."""
        error, size = 0.0, 0.0
        for held, inputs, wanted in self._parts():
            if held:
                error += float((wanted - self._experts(inputs)).double().square().sum())
                size += float(wanted.double().square().sum())
        return share(error, size)

    def _sums(self, numbers: range) -> tuple[list[tuple[Sums, Sums]], int]:
        experts, tokens = self._experts, 0
        sums = [[Sums.empty(experts.inner, experts.width, bias=experts.bias) for _ in range(2)] for _ in numbers]
        for held, inputs, wanted in self._parts():
            entered, chosen, weights = experts.unpacked(inputs)
            missing = (wanted - experts(inputs)) / _from_zero(weights.sum(1, keepdim=True))
            tokens += len(inputs)
            for number, both in zip(numbers, sums):
                rows, places = (chosen == number).nonzero(as_tuple=True)
                if not len(rows):
                    continue
                weigh = weights[rows, places, None]
                inner = experts.entering(number, entered[rows])
                old = experts.weight_of(number).to(inner)
                made = inner @ old[: experts.inner] + (old[-1] if experts.bias else 0)
                both[held] = both[held].add(inner, made + missing[rows], weigh)
        return [(fit.settled(), held.settled()) for fit, held in sums], tokens


def _from_zero(weights: Tensor) -> Tensor:
    return torch.where(weights.abs() > 1e-3, weights, torch.full_like(weights, 1e-3))
