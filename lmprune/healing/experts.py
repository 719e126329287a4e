"""A solve for each of a layer's experts.

With R what is missing of a token's output and w what its experts weigh, each of them is asked for R / sum(w) more than
it gives: then their weighted sum is right. An expert's tokens count by the square of their weight. The ridge is one for
all experts, in units of the mean over them, so that an expert that few tokens go to stays near its old weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmprune.forward.experts import Experts
from lmprune.healing.fitting import Parts
from lmprune.healing.solving import AROUND, KEEP, Sums, share, solve

_SUMS_BYTES = 1 << 30
"""Sums of experts that are kept at once; with more experts the text is gone through again."""


class ExpertsSolver:
    """Solves the `down_proj` of each expert on the tokens that go to it; the router stays."""

    def __init__(self, experts: Experts, parts: Parts, ridges: Sequence[float]) -> None:
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
        for inputs, wanted in self._parts(True):
            error += float((wanted - self._experts(inputs)).double().square().sum())
            size += float(wanted.double().square().sum())
        return share(error, size)

    def _sums(self, numbers: range) -> tuple[list[tuple[Sums, Sums]], int]:
        experts, tokens = self._experts, 0
        sums = [[Sums.empty(experts.inner, experts.width, bias=experts.bias) for _ in range(2)] for _ in numbers]
        for part in (False, True):
            for inputs, wanted in self._parts(part):
                entered, chosen, weights = experts.unpacked(inputs)
                missing = (wanted - experts(inputs)) / _from_zero(weights.sum(1, keepdim=True))
                tokens += len(inputs)
                for number, both in zip(numbers, sums):
                    rows, places = (chosen == number).nonzero(as_tuple=True)
                    if not len(rows):
                        continue
                    weigh = weights[rows, places, None]
                    inner = experts.entering(number, entered[rows])
                    both[part] = both[part].add(inner, experts.made(number, inner) + missing[rows], weigh)
        return [(fit.settled(), held.settled()) for fit, held in sums], tokens


def _from_zero(weights: Tensor) -> Tensor:
    return torch.where(weights.abs() > 1e-3, weights, torch.full_like(weights, 1e-3))
