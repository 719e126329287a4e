"""Ridge regression from sums: the best linear map from what enters a projection to what it should write.

For inputs A (tokens, d_in) and wanted outputs Y (tokens, d_out) all that is kept is A'A, A'Y and the size of Y, which
are sums over tokens: memory is d_in^2 + d_in d_out, however much text goes by. They give a solution for every ridge
and its squared error on the tokens that they are of. All of it is float64 on the CPU; on a GPU, where float64 is slow,
the sums are float32 that keep what each addition rounded off, and become float64 at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from scipy.linalg.lapack import dpotrf, dpotrs
from torch import Tensor

_CHUNK = 256
"""Tokens whose sums are made in float32 before what is rounded off is kept."""
KEEP = "keep"
"""The weight stays as it is."""
AROUND = "around"
"""Around the old weight: what is regularised is the change."""
SINGULAR = "singular"
"""No ridge that was asked for has a solution: the weight stays as it is."""
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
        low: of sums that are gathered on a GPU what their additions rounded off so far; see `settled`.
    """

    gram: Tensor
    cross: Tensor
    size: Tensor
    tokens: int
    bias: bool
    low: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    def empty(cls, inputs: int, outputs: int, *, bias: bool) -> Sums:
        """Of no tokens yet; ``inputs`` without the column of ones."""
        rows = inputs + bias
        gram, cross = (torch.zeros(rows, columns, dtype=torch.float64) for columns in (rows, outputs))
        return cls(gram, cross, torch.zeros(outputs, dtype=torch.float64), 0, bias)

    def add(self, inputs: Tensor, wanted: Tensor, weights: Tensor | None = None) -> Sums:
        """With the tokens of ``inputs`` (tokens, d_in) and ``wanted`` (tokens, d_out); the tensors are added to.

        ``weights`` (tokens, 1) multiply the error of each token.
        """
        weights = None if weights is None else weights.detach()
        if inputs.device.type != "cpu":
            return self.add_compensated(inputs.detach(), wanted.detach(), weights)
        inputs, wanted = self._rows(inputs.detach().double(), wanted.detach().double(), weights)
        self.gram.addmm_(inputs.T, inputs)
        self.cross.addmm_(inputs.T, wanted)
        self.size.add_(wanted.square().sum(0))
        return Sums(self.gram, self.cross, self.size, self.tokens + len(inputs), self.bias)

    def _rows(self, inputs: Tensor, wanted: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        inputs = with_ones(inputs) if self.bias else inputs
        return (inputs, wanted) if weights is None else (inputs * weights.to(inputs), wanted * weights.to(inputs))

    def add_compensated(self, inputs: Tensor, wanted: Tensor, weights: Tensor | None = None) -> Sums:
        """As `add`, in float32 where the tensors are, with what each addition of a few tokens' sums rounds off."""
        inputs, wanted = self._rows(inputs.float(), wanted.float(), weights)
        gram, cross, size = (each.to(inputs) for each in (self.gram, self.cross, self.size))
        lost = self.low or (torch.zeros_like(gram), torch.zeros_like(cross), torch.zeros_like(size))
        for start in range(0, len(inputs), _CHUNK):
            rows, values = inputs[start : start + _CHUNK], wanted[start : start + _CHUNK]
            _add(gram, lost[0], rows.T @ rows)
            _add(cross, lost[1], rows.T @ values)
            _add(size, lost[2], values.square().sum(0))
        return Sums(gram, cross, size, self.tokens + len(inputs), self.bias, lost)

    def settled(self) -> Sums:
        """In float64 on the CPU, with what was rounded off."""
        if self.low is None:
            return self
        gram, cross, size = (
            high.to("cpu", torch.float64).add_(low.cpu())
            for high, low in zip((self.gram, self.cross, self.size), self.low)
        )
        return Sums(gram, cross, size, self.tokens, self.bias)

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
        return share(self.squared_error(solution), float(self.size.sum()))

    def squared_error(self, solution: Tensor) -> float:
        """The same, not as a share."""
        return float(self.size.sum()) + float((solution * (self.gram @ solution - 2 * self.cross)).sum())


def _add(total: Tensor, lost: Tensor, more: Tensor) -> None:
    """``total`` + ``more``, in place, and what that rounds off into ``lost`` (Knuth's two-sum)."""
    summed = total + more
    part = summed - total
    lost += (total - (summed - part)) + (more - part)
    total.copy_(summed)


def share(error: float, size: float) -> float:
    """The error as a share of the size; infinite where nothing is wanted and something is written."""
    return max(error, 0.0) / size if size else (0.0 if error <= 0 else math.inf)


def with_ones(inputs: Tensor) -> Tensor:
    """``inputs`` (tokens, d_in) with a last column of ones."""
    return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)


def solve(sums: Sums, ridge: float, *, around: Tensor | None = None, scale: float | None = None) -> Tensor:
    """The weight (d_in, d_out) that minimises the squared error plus the ridge times the square of its distance.

    The distance is that to ``around``, or to zero. The ridge is in units of the mean of the diagonal of A'A; a bias
    bears none. ``scale`` is a unit to take in its place. Where there is no solution, it is what it starts from.
    """
    found = solution(sums, ridge, around=around, scale=scale)
    return _start(sums, around) if found is None else found


def _start(sums: Sums, around: Tensor | None) -> Tensor:
    return torch.zeros_like(sums.cross, device="cpu", dtype=torch.float64) if around is None else around


def solution(sums: Sums, ridge: float, *, around: Tensor | None = None, scale: float | None = None) -> Tensor | None:
    """As `solve`; None where there is none. With a ridge without end it is what it starts from."""
    if math.isinf(ridge):
        return _start(sums, around)
    with _factored(sums, scale) as factored:
        return factored.solved(around) if factored.by(ridge) else None


class _Factored:
    """A'A and a ridge, in the place of A'A: it is the largest tensor that there is, and symmetric.

    Its lower triangle holds the Cholesky factor and the upper one stays what it was, so that LAPACK is called directly:
    torch copies the matrix to factor it, and once more to solve with it.
    """

    def __init__(self, sums: Sums, scale: float | None) -> None:
        self._sums, self._gram = sums, sums.gram
        # By columns, as LAPACK has it: the same memory, so that its upper triangle is the lower one here.
        self._columns = sums.gram.numpy().T
        self._free = len(sums.gram) - sums.bias  # of the rows that bear a ridge
        self._diagonal = sums.gram.diagonal().clone()
        self._scale = float(self._diagonal[: self._free].mean()) if scale is None else scale
        self._ridge = 0.0

    def by(self, ridge: float) -> bool:
        """Whether there is a factor with this ridge; there is none with too few tokens, and next to no ridge."""
        self.restore()
        self._ridge = ridge * self._scale
        self._gram.diagonal()[: self._free] += self._ridge
        _, failed = dpotrf(self._columns, lower=0, clean=0, overwrite_a=1)
        return not failed and bool(self._gram.diagonal().isfinite().all())  # some factor what is no number

    def solved(self, around: Tensor | None) -> Tensor:
        """The solution, a few outputs at a time: (A'A + r) W = A'Y + r ``around``, or without the last term."""
        found = torch.empty_like(self._sums.cross)
        for start in range(0, found.shape[1], _OUTPUTS):
            some = slice(start, start + _OUTPUTS)
            wanted = self._sums.cross[:, some].clone()
            if around is not None:
                wanted[: self._free] += self._ridge * around[: self._free, some]
            solution, _ = dpotrs(self._columns, wanted.numpy(), lower=0)
            found[:, some] = torch.from_numpy(solution)
        return found

    def restore(self) -> None:
        """Make A'A of it again."""
        for start in range(0, len(self._gram), _ROWS):
            stop = start + _ROWS
            block = self._gram[start:stop, start:stop]
            block.copy_(block.triu() + block.triu(1).T)
            self._gram[start:stop, :start] = self._gram[:start, start:stop].T
        self._gram.diagonal().copy_(self._diagonal)


_ROWS = 1024
_OUTPUTS = 512
"""So many are worked on at a time."""


@contextmanager
def _factored(sums: Sums, scale: float | None = None) -> Iterator[_Factored]:
    """Within the block the sums cannot be used. Those that were gathered on a GPU are copied."""
    found = _Factored(sums.settled(), scale)
    try:
        yield found
    finally:
        found.restore()


@dataclass(frozen=True)
class Candidate:
    """A way to find the weight, and what it gave."""

    form: str
    ridge: float | None
    weight: Tensor


def candidates(
    sums: Sums, old: Tensor, ridges: Sequence[float], forms: Sequence[str] = (AROUND, ZERO)
) -> Iterator[Candidate]:
    """All forms for each ridge; ``old`` is the old weight (d_in, d_out). The sums are in use until the last of them."""
    with _factored(sums) as factored:
        for ridge in ridges:
            if not math.isinf(ridge) and factored.by(ridge):  # else the one is the old weight, the other none at all
                for form in forms:
                    yield Candidate(form, ridge, factored.solved(old if form == AROUND else None))


def unchanged(ridges: Sequence[float], *, solved: bool) -> str:
    """The form of a weight that stays, where there was a solution or none for any of ``ridges``."""
    return KEEP if solved or all(map(math.isinf, ridges)) else SINGULAR


def solve_as(choice: Candidate, sums: Sums, old: Tensor) -> Candidate:
    """The same form and ridge on other sums; ``choice`` itself where they have no solution."""
    if choice.ridge is None:
        return choice
    weight = solution(sums, choice.ridge, around=old if choice.form == AROUND else None)
    return choice if weight is None else Candidate(choice.form, choice.ridge, weight)
