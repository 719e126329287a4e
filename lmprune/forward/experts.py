"""Fused experts: how they are called, what enters each one's last projection, and what each makes of it.

transformers keeps the experts of a layer in tensors of three dimensions and calls them with tokens, the numbers of the
experts that each goes to, and what each of these weighs. What an expert feeds its `down_proj` with is had from the
module by putting rows of the identity in that tensor's place, so that no activation function has to be known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def are_experts(module: nn.Module) -> bool:
    """Whether it may be a module of fused experts."""
    weight = getattr(module, "down_proj", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 3 and weight.is_floating_point()


def called_with(values: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Tokens (tokens, d), the numbers of their experts (tokens, k), and what these weigh; None of another call."""
    if len(values) != 3 or not all(isinstance(value, Tensor) and value.dim() == 2 for value in values):
        return None
    tokens, numbers, weights = values
    if numbers.is_floating_point() or numbers.shape != weights.shape or len(tokens) != len(numbers):
        return None
    return tokens, numbers, weights


def packed(values: Sequence[Any]) -> Tensor | None:
    """The parts of `called_with` as one tensor, (tokens, d + 2 k).

    None also where the tokens' type cannot hold the number of every expert, as bfloat16 beyond 256.
    """
    parts = called_with(values)
    if parts is None or not torch.equal(parts[1].to(parts[0]).long(), parts[1].long()):
        return None
    tokens, numbers, weights = parts
    return torch.cat([tokens, numbers.to(tokens), weights.to(tokens)], dim=1)


def unpacked(values: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of `packed`, of tokens of that width."""
    chosen = (values.shape[-1] - width) // 2
    tokens, numbers, weights = values.split([width, chosen, chosen], dim=-1)
    return tokens, numbers.round().long(), weights


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

    def made(self, number: int, inner: Tensor) -> Tensor:
        """What that expert writes of what enters its `down_proj`, (tokens, inner) -> (tokens, width)."""
        weight = self.weight_of(number).to(inner)
        return inner @ weight[: self.inner] + (weight[-1] if self.bias else 0)

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
        return unpacked(values, self.width)

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


def known_experts(module: nn.Module, called: tuple[Tensor, Tensor, Tensor]) -> Experts | None:
    """Those of a module, where what it makes of the first token is what they, one by one, make of it.

    Args:
        called: what `called_with` gives of a call.
    """
    tokens, numbers, weights = (part[:1].contiguous() for part in called)
    width = tokens.shape[-1]
    if not are_experts(module) or width not in module.get_parameter("down_proj").shape[1:]:
        return None
    try:
        experts, made = Experts(module, width), torch.zeros_like(tokens, dtype=torch.float64, device="cpu")
        for number, weigh in zip(numbers[0].tolist(), weights[0].tolist()):
            made += weigh * experts.made(number, experts.entering(number, tokens).cpu().double())
        wanted = module(tokens, numbers, weights).cpu().double()
    except (RuntimeError, TypeError, LookupError):
        return None
    tolerance = 1e-3 if tokens.dtype == torch.float32 else 3e-2
    return experts if (made - wanted).norm() <= tolerance * wanted.norm() else None
