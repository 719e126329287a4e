"""When enough samples have been seen: a sequential rule with an indifference zone. Pure: numpy.

Let d_l be the distance of the block of n layers that starts at l, i the start with the smallest mean so far, and
delta = indifference x mean d_i. At every look the rule asks of each rival j, by a one-sided paired t-test on the
samples' differences d_j - d_i, whether it can be ruled out that j is better than i by more than delta. It stops when
that holds for all rivals. The error 1 - level is shared equally among the rivals and among looks as 1/(k(k+1)) for
look k = 1, 2, ..., which sums to 1 however many looks there are. By the union bound the probability to stop at a block
that is truly worse than the best by more than delta is at most 1 - level.

Near-ties are common and harmless; without the zone they would never end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from lmprune.profiling.distances import LEAST_SAMPLES

FIRST_LOOK = LEAST_SAMPLES
"""Of the samples; the t-test leans on the central limit theorem."""
GROWTH = 1.25
"""A next look is taken when there are this many times the samples of the one before."""


@dataclass(frozen=True)
class Rule:
    """Certainty about the best block of ``n`` of ``layers`` layers."""

    layers: int
    n: int
    level: float
    indifference: float

    def settled(self, distances: NDArray[np.float64], look: int) -> bool:
        """Whether the best start is certain at the ``look``-th look (from 1); distances are (samples, L-n+1)."""
        samples, starts = distances.shape
        if starts == 1:
            return True
        means = distances.mean(axis=0)
        best = int(means.argmin())
        rivals = np.delete(distances, best, axis=1) - distances[:, [best]]
        slack = rivals.mean(axis=0) + self.indifference * means[best]
        error = rivals.std(axis=0, ddof=1) / math.sqrt(samples)
        tail = (1 - self.level) / ((starts - 1) * look * (look + 1))
        return bool((slack >= t_quantile(1 - tail, samples - 1) * error).all())


def looks(total: int, window: int) -> list[int]:
    """The numbers of samples at which the rule looks: whole windows, from `FIRST_LOOK`, each `GROWTH` times the last.

    >>> looks(400, 64)
    [64, 128, 192, 256, 320, 400]
    """
    found: list[int] = []
    for samples in [*range(window, total, window), total]:
        if samples >= (found[-1] * GROWTH if found else FIRST_LOOK):
            found.append(samples)
    return found


def t_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t by the Cornish-Fisher expansion: within 1e-3 from 30 degrees of freedom on.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    z, v = NormalDist().inv_cdf(p), freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


@dataclass(frozen=True)
class Race:
    """Which of several plans are surely worse than the best so far, seen on the same samples.

    A plan drops out when a one-sided paired t-test says that the best so far is better: at look k of a race of m plans
    with the error (1 - level) / ((m - 1) k (k + 1)). The plan that is truly best on all samples is compared with at
    most m - 1 others at each look, so by the union bound it drops out with a probability of at most 1 - level. Samples
    are drawn without replacement from those that there are: the variance has the factor 1 - seen / all.
    """

    level: float = 0.95

    def losers(
        self, parts: Sequence[NDArray[np.float64]], totals: Sequence[int], rivals: int, look: int
    ) -> dict[int, float]:
        """Row -> by how much it is behind the best.

        Args:
            parts: (plans, samples) of each of several independent sets of samples; a loss is the sum of their means.
            totals: the samples that there are in each set.
            rivals: plans that the race began with.
            look: from 1.
        """
        means = np.sum([part.mean(axis=1) for part in parts], axis=0)
        best = int(means.argmin())
        variance, freedom = np.zeros(len(means)), []
        for part, total in zip(parts, totals):
            seen = part.shape[1]
            if seen < total:
                variance += (part - part[best]).var(axis=1, ddof=1) / seen * (1 - seen / total)
                freedom.append(seen - 1)
        if not freedom:
            return {row: float(gap) for row, gap in enumerate(means - means[best]) if gap > 0}
        tail = (1 - self.level) / (max(1, rivals - 1) * look * (look + 1))
        behind = means - means[best]
        out = behind > t_quantile(1 - tail, min(freedom)) * np.sqrt(variance)
        return {int(row): float(behind[row]) for row in np.flatnonzero(out) if row != best and behind[row] > 0}
