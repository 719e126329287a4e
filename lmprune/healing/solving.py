"""Ridge regression from sums: the best linear map from what enters a projection to what it should write.

For inputs A (tokens, d_in) and wanted outputs Y (tokens, d_out) all that is kept is A'A, A'Y and the size of Y, which
are sums over tokens: memory is d_in^2 + d_in d_out, however much text goes by. They give a solution for every ridge
and its squared error on the tokens that they are of, so that candidates fitted on one part of the text are compared
on the sums of another. All of it is float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KEEP = "keep"
"""The weight stays as it is."""
AROUND = "around"
"""Around the old weight: what is regularised is the change."""
ZERO = "zero"
"""From zero: what is regularised is the weight."""


@dataclass(frozen=True)
class Sums:
    """Sums over tokens.

    Attributes:
        gram: A'A (d_in, d_in).
        cross: A'Y (d_in, d_out).
        size: the sums of the squares of Y, (d_out,).
        tokens: how many there were.
        bias: whether the last column of A is ones, so that the last row of a solution is a bias.
    """

    gram: Tensor
    cross: Tensor
    size: Tensor
    tokens: int
    bias: bool

    @classmethod
    def empty(cls, inputs: int, outputs: int, *, bias: bool) -> Sums:
        """Of no tokens yet; ``inputs`` without the column of ones."""
        rows = inputs + bias
        gram, cross = (torch.zeros(rows, columns, dtype=torch.float64) for columns in (rows, outputs))
        return cls(gram, cross, torch.zeros(outputs, dtype=torch.float64), 0, bias)

    def add(self, inputs: Tensor, wanted: Tensor) -> Sums:
        """With the tokens of ``inputs`` (tokens, d_in) and ``wanted`` (tokens, d_out); the tensors are added to."""
        inputs, wanted = inputs.detach().to("cpu", torch.float64), wanted.detach().to("cpu", torch.float64)
        if self.bias:
            inputs = with_ones(inputs)
        self.gram.addmm_(inputs.T, inputs)
        self.cross.addmm_(inputs.T, wanted)
        self.size.add_(wanted.square().sum(0))
        return Sums(self.gram, self.cross, self.size, self.tokens + len(inputs), self.bias)

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.gram + other.gram,
            self.cross + other.cross,
            self.size + other.size,
            self.tokens + other.tokens,
            self.bias,
        )

    def outputs(self, start: int, stop: int) -> Sums:
        """Those of some outputs alone."""
        return Sums(self.gram, self.cross[:, start:stop], self.size[start:stop], self.tokens, self.bias)

    def error(self, solution: Tensor) -> float:
        """The squared error of A ``solution`` (d_in, d_out), as a share of the squares of Y."""
        size = float(self.size.sum())
        error = size + float((solution * (self.gram @ solution - 2 * self.cross)).sum())
        return share(error, size)


def share(error: float, size: float) -> float:
    """The error as a share of the size; infinite where nothing is wanted and something is written."""
    return max(error, 0.0) / size if size else (0.0 if error <= 0 else math.inf)


def with_ones(inputs: Tensor) -> Tensor:
    """``inputs`` (tokens, d_in) with a last column of ones."""
    return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)


def solve(sums: Sums, ridge: float, *, around: Tensor | None = None) -> Tensor:
    """The weight (d_in, d_out) that minimises the squared error plus the ridge times the square of its distance.

    The distance is that to ``around``, or to zero. The ridge is in units of the mean of the diagonal of A'A; a bias
    bears none.
    """
    start = torch.zeros_like(sums.cross) if around is None else around
    if math.isinf(ridge):
        return start
    diagonal = sums.gram.diagonal()
    penalty = torch.full_like(diagonal, ridge * float(diagonal[: len(diagonal) - sums.bias].mean()))
    if sums.bias:
        penalty[-1] = 0.0
    factor, failed = torch.linalg.cholesky_ex(sums.gram + penalty.diag())
    if failed:  # fewer tokens than inputs, and next to no ridge
        return start
    wanted = sums.cross if around is None else sums.cross - sums.gram @ around
    return start + torch.cholesky_solve(wanted, factor)


@dataclass(frozen=True)
class Candidate:
    """A way to find the weight, and what it gave."""

    form: str
    ridge: float | None
    weight: Tensor


def candidates(sums: Sums, old: Tensor, ridges: Sequence[float]) -> Iterator[Candidate]:
    """Both forms for each ridge; ``old`` is the old weight (d_in, d_out)."""
    for ridge in ridges:
        yield Candidate(AROUND, ridge, solve(sums, ridge, around=old))
        if not math.isinf(ridge):  # which would be no weight at all
            yield Candidate(ZERO, ridge, solve(sums, ridge))


def solve_as(choice: Candidate, sums: Sums, old: Tensor) -> Candidate:
    """The same form and ridge on other sums."""
    if choice.ridge is None:
        return choice
    weight = solve(sums, choice.ridge, around=old if choice.form == AROUND else None)
    return Candidate(choice.form, choice.ridge, weight)
