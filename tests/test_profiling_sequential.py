"""The rule of --until, by simulation: it holds its level, ends on near-ties, and does not end by chance."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from numpy.typing import NDArray

from lmprune.forward.batches import batches_of, window_of
from lmprune.profiling.sequential import FIRST_LOOK, Rule, looks, t_quantile

LAYERS, N = 15, 4
STARTS = LAYERS - N + 1
MOST = 4000


def stopped(
    means: NDArray[np.float64], noise: str, seed: int, level: float = 0.95, spread: float = 0.25
) -> tuple[int | None, int]:
    """(start that the rule stops at, or None; samples it took) in one simulated run.

    ``spread`` is the noise that blocks do not share, relative to the distance.
    """
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((MOST, 1))  # a hard sample is hard for every block
    own = rng.standard_normal((MOST, STARTS))
    values = 0.15 * shared + spread * own
    if noise == "skewed":
        values = np.exp(values - (0.15**2 + spread**2) / 2) - 1
    distances = means * (1 + values)
    rule = Rule(LAYERS, N, level, 0.01)
    for number, samples in enumerate(looks(MOST, 64), 1):
        if rule.settled(distances[:samples], number):
            return int(distances[:samples].mean(axis=0).argmin()), samples
    return None, MOST


@pytest.mark.parametrize("noise", ["normal", "skewed"])
def test_the_level_holds_where_it_is_hardest(noise: str) -> None:
    """Every rival is just beyond the indifference zone: the wrong stops are at most 5 % (here plus 2 sigma)."""
    means = np.full(STARTS, 0.2 * 1.012)
    means[5] = 0.2
    runs = [stopped(means, noise, seed) for seed in range(300)]
    wrong = sum(start not in (None, 5) for start, _ in runs)
    assert wrong / len(runs) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / len(runs))


def test_a_clear_winner_is_found_from_few_samples() -> None:
    means = np.full(STARTS, 0.25)
    means[5] = 0.2
    runs = [stopped(means, "skewed", seed) for seed in range(100)]
    assert {start for start, _ in runs} == {5}
    assert np.mean([samples for _, samples in runs]) < 200


def test_near_ties_end_and_either_is_good() -> None:
    """Two blocks closer than the zone: a rule without one would go on for ever."""
    means = np.full(STARTS, 0.25)
    means[5], means[6] = 0.2, 0.2 * 1.0005
    runs = [stopped(means, "normal", seed, spread=0.08) for seed in range(60)]
    assert {start for start, _ in runs} == {5, 6}
    assert max(samples for _, samples in runs) < MOST
    strict = Rule(LAYERS, N, 0.95, 0.0)
    distances = np.random.default_rng(0).random((5000, STARTS))
    assert not strict.settled(distances, 1)


def test_a_higher_level_takes_more_samples() -> None:
    means = np.full(STARTS, 0.215)
    means[5] = 0.2
    low, high = (np.mean([stopped(means, "normal", seed, level)[1] for seed in range(30)]) for level in (0.8, 0.999))
    assert low < high


def test_looks_are_whole_windows_and_grow() -> None:
    found = looks(10_000, 64)
    assert found[0] == FIRST_LOOK and found[-1] <= 10_000 and len(found) < 30
    assert all(samples % 64 == 0 for samples in found[:-1])
    assert all(after >= 1.25 * before for before, after in zip(found, found[1:]))
    assert looks(40, 64) == []


def test_one_block_is_certain() -> None:
    assert Rule(4, 4, 0.95, 0.01).settled(np.ones((2, 1)), 1)


@pytest.mark.parametrize("freedom", [63, 127, 999])
@pytest.mark.parametrize("p", [0.9, 0.999, 0.99999])
def test_t_quantile_against_scipy(freedom: int, p: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert t_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), abs=1e-3)


def test_windows_are_whole_batches_and_random_samples() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 500).tolist()
    for size in (1, 7, 8, 100):
        batches = batches_of(lengths, size)
        assert sorted(chain(*batches)) == list(range(500))
        assert max(map(len, batches)) <= size
        window = window_of(size)
        first = list(chain(*batches[: window // size]))
        assert sorted(first) == list(range(window))
        assert [lengths[i] for i in first] == sorted(lengths[i] for i in first)
