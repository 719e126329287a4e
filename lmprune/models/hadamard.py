"""Orthonormal matrices of which all entries are of one size, or nearly: what spreads a few large channels over all.

A Hadamard matrix has entries of 1 and -1 and orthogonal rows. Sylvester's construction gives powers of two, Paley's two
an order q + 1 for a prime q = 3 (mod 4), and 2 (q + 1) for a prime q = 1 (mod 4); the Kronecker product of two is one
(https://en.wikipedia.org/wiki/Paley_construction). So of a width d the odd part is made up to such an order, and
Sylvester's does the rest: that reaches all of 640, 896, 1152, 2304, 2560, 2880, 3072, 3584, 4544, 5120. Where none is
known, the odd part is an orthonormal cosine transform, whose entries differ, but none is large.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=2)
def hadamard(width: int) -> Tensor:
    """H, (width, width) in float64, with H H' = 1; the same for the same width wherever it is made.

    >>> (hadamard(12).abs() * 12**0.5).unique().tolist()
    [1.0]
    """
    odd = width
    while odd % 2 == 0:
        odd //= 2
    core = next((made for order in _doubled(odd, width) if (made := _paley(order)) is not None), None)
    if core is None:
        core = _cosines(odd) * math.sqrt(odd)
    while len(core) < width:
        core = torch.cat([torch.cat([core, core], dim=1), torch.cat([core, -core], dim=1)])
    return core / math.sqrt(width)


def _doubled(odd: int, width: int) -> list[int]:
    """The odd part, and it doubled and doubled up to the width."""
    return [odd << times for times in range((width // odd).bit_length())]


def _paley(order: int) -> Tensor | None:
    """A Hadamard matrix of that order by one of Paley's constructions, or the trivial one; None where neither fits."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 4:
        return None
    if _is_prime(order - 1):  # which is 3 (mod 4)
        jacobsthal = _jacobsthal(order - 1)
        skew = torch.zeros(order, order, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, jacobsthal
        return skew + torch.eye(order)
    half = order // 2
    if half % 4 == 2 and _is_prime(half - 1):
        conference = torch.zeros(half, half, dtype=torch.float64)
        conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, _jacobsthal(half - 1)
        ones, mixed = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        return torch.kron(conference, ones.double()) + torch.kron(torch.eye(half).double(), mixed.double())
    return None


def _jacobsthal(prime: int) -> Tensor:
    """1 where the difference of row and column is a square modulo the prime, -1 where it is none, 0 where it is 0."""
    places = torch.arange(prime)
    signs = torch.full((prime,), -1.0, dtype=torch.float64)
    signs[places[1:] ** 2 % prime] = 1
    signs[0] = 0
    return signs[(places[:, None] - places[None, :]) % prime]


def _cosines(width: int) -> Tensor:
    """The orthonormal discrete cosine transform."""
    places = torch.arange(width, dtype=torch.float64)
    table = torch.cos(math.pi / width * (places[:, None] + 0.5) * places[None, :]) * math.sqrt(2 / width)
    table[:, 0] = 1 / math.sqrt(width)
    return table


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
