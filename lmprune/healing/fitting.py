"""What a projection should write, by the ridge regression that does best on text that it was not fitted on.

The sums of the text to fit on are all that is kept of it. Candidates are judged on the held-out text itself, whose
inputs wait anyway, and the sums then take it up as well: so there is one Gram matrix, in which the solves take place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from lmprune.healing.solving import AROUND, KEEP, ZERO, Candidate, Sums, candidates, share, solve_as, unchanged

Parts = Callable[[bool], Iterator[tuple[Tensor, Tensor]]]
"""Of the held-out text or of the other, batch by batch: what enters, (tokens, d_in), and what should be written."""


@dataclass(frozen=True)
class Fitted:
    """What was chosen.

    Attributes:
        ridge: None where nothing changes.
        weight: (d_in, d_out), in float64 on the CPU; the old one where nothing does better.
        before: the squared error on held-out text as a share of what should be written, with the old weight.
        after: the same with what was chosen, as fitted without that text.
        tokens: of both parts.
    """

    form: str
    ridge: float | None
    weight: Tensor
    before: float
    after: float
    tokens: int

    @property
    def outcome(self) -> tuple[str, float | None, float, float, int]:
        """All but the weight."""
        return self.form, self.ridge, self.before, self.after, self.tokens


def fitted(
    parts: Parts,
    old: Tensor,
    ridges: Sequence[float],
    *,
    bias: bool,
    forms: Sequence[str] = (AROUND, ZERO),
    all_text: bool = True,
) -> Fitted:
    """The best of all ``forms`` and ``ridges``, or ``old``, (d_in, d_out) with the bias as its last row.

    Args:
        all_text: solve it on the held-out text as well, unless that is to judge more.
    """
    sums = gathered(parts(False), inputs=len(old) - bias, outputs=old.shape[1], bias=bias)
    fit = sums.settled()
    before, held = apart(parts(True), old, bias=bias)
    best, error, solved = Candidate(KEEP, None, old), before, False
    for candidate in candidates(fit, old, ridges, forms):
        solved = True
        found, _ = apart(parts(True), candidate.weight, bias=bias)
        if found < error:
            best, error = candidate, found
        del candidate  # the next one is made before this name is given to it
    tokens = fit.tokens + held
    del fit  # of sums on a GPU a copy
    if best.ridge is None:
        return Fitted(unchanged(ridges, solved=solved), None, old, before, error, tokens)
    if all_text:
        best = solve_as(best, gathered(parts(True), sums).settled(), old)
    return Fitted(best.form, best.ridge, best.weight, before, error, tokens)


def gathered(
    parts: Iterable[tuple[Tensor, Tensor]],
    sums: Sums | None = None,
    *,
    inputs: int = 0,
    outputs: int = 0,
    bias: bool = False,
) -> Sums:
    """``sums``, or new ones of so many ``inputs`` and ``outputs``, with these tokens."""
    sums = sums or Sums.empty(inputs, outputs, bias=bias)
    for entered, wanted in parts:
        sums = sums.add(entered, wanted)
    return sums


def apart(parts: Iterable[tuple[Tensor, Tensor]], weight: Tensor, *, bias: bool) -> tuple[float, int]:
    """The squared error of ``weight``, (d_in, d_out), as a share of the squares of what is wanted; and the tokens."""
    error, size, tokens = 0.0, 0.0, 0
    known: Tensor | None = None
    for entered, wanted in parts:
        known = weight.to(entered) if known is None else known
        wanted = wanted.to(entered)
        written = entered @ (known[:-1] if bias else known)
        error += float((written + known[-1] - wanted if bias else written - wanted).double().square().sum())
        size += float(wanted.double().square().sum())
        tokens += len(entered)
    return share(error, size), tokens
