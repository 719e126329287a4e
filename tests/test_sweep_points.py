"""The tree of kept layers, the points of a sweep, the gate: everything that needs no model."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from lmprune.cuts.plan import Plan
from lmprune.errors import UsageError
from lmprune.evaluation.gate import Gate
from lmprune.evaluation.rows import Score
from lmprune.forward.tree import passes, walk
from lmprune.sweeping.launch import arguments, shares
from lmprune.sweeping.points import Point, counts, early_first, in_order
from lmprune.sweeping.settings import SweepSettings
from lmprune.text.sources import DataSettings


def _edges(paths: dict[str, tuple[int, ...]]) -> int:
    return len({path[:depth] for path in paths.values() for depth in range(1, len(path) + 1)})


@pytest.mark.parametrize("seed", range(30))
def test_a_walk_computes_every_edge_once_and_has_every_state_it_needs(seed: int) -> None:
    rng = random.Random(seed)
    layers = rng.randint(1, 9)
    paths = {str(i): tuple(sorted(rng.sample(range(layers), rng.randint(1, layers)))) for i in range(rng.randint(1, 7))}
    turns = walk(paths)
    assert sorted(turn.name for turn in turns) == sorted(paths)
    states: dict[int, tuple[int, ...]] = {}
    for turn in turns:
        states = {depth: done for depth, done in states.items() if depth <= turn.start}
        if turn.start:
            assert states[turn.start] == turn.path[: turn.start]
        assert all(turn.start < depth <= len(turn.path) for depth in turn.saves)
        states |= {depth: turn.path[:depth] for depth in turn.saves}
    assert passes(turns) == (_edges(paths), sum(map(len, paths.values())))


def test_deepest_cuts_of_24_layers_share_most_of_their_passes() -> None:
    plans = [Plan(24, tuple(range(23 - n, 23))) for n in counts((0.1, 0.2, 0.3, 0.4, 0.5), 24)]
    shared, separate = passes(walk({str(i): plan.kept for i, plan in enumerate(plans)}))
    assert shared / separate < 0.5


def test_counts_of_fractions() -> None:
    assert counts((0.1, 0.25, 0.5), 12) == [1, 3, 6]
    with pytest.raises(UsageError, match=r"both are 1 of 12 layers"):
        counts((0.08, 0.1), 12)
    with pytest.raises(UsageError, match="rounds to 0"):
        counts((0.01,), 12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fractions": "0.1;0.2"}, "give numbers with commas"),
        ({"fractions": "0.1,1.5"}, "between 0 and 1"),
        ({"criteria": "angular,angular"}, "named twice"),
        ({"budget": "soon"}, "is no time"),
        ({"batch_size": "big"}, "--batch-size 'big'"),
        ({"heal_steps": 5}, "needs --heal"),
        ({"processes": 2}, "needs --launcher"),
        ({"limit": 0}, "--limit 0"),
        ({"agree": -1}, "--agree -1"),
        ({"quantizations": "int9"}, "--quantizations 'int9'.*did you mean 'int8'.* Choose from nf4, int8"),
        ({"quantizations": "bf16,int8"}, "--quantizations bf16: the model's own type is always measured"),
        ({"quantizations": "int8,int8"}, "named twice"),
        ({"quantizations": "int8", "quantization": "nf4"}, "--quantizations int8 beside --quantization"),
        ({"device": "tpu"}, "--device 'tpu' is no device"),
        ({"dtype": "nonsense"}, "--dtype 'nonsense'"),
    ],
)
def test_bad_settings(options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        SweepSettings(**options)  # type: ignore[arg-type]


def test_budget_is_read_as_people_write_it() -> None:
    read = {text: SweepSettings(budget=text).seconds() for text in ("2h", "90m", "1h30m", "45s", "1.5h")}
    assert read == {"2h": 7200, "90m": 5400, "1h30m": 5400, "45s": 45, "1.5h": 5400}


@pytest.mark.parametrize("count", range(1, 12))
def test_the_order_is_usable_early(count: int) -> None:
    order = early_first(list(range(count)))
    assert sorted(order) == list(range(count))
    if count >= 7:
        assert {number * 3 // count for number in order[:3]} == {0, 1, 2}


def _points(healed: bool = True) -> list[Point]:
    cuts = [Point(f"{c}-{n:02d}", c, 12, tuple(range(2, 2 + n))) for c in ("angular", "deepest") for n in (1, 3, 6)]
    more = [Point(f"{cut.name}-healed", cut.criterion, 12, cut.dropped, True) for cut in cuts] if healed else []
    return [Point("baseline", None, 12, ()), *cuts, *more]


def test_the_base_comes_first_and_healing_last() -> None:
    order = in_order(_points())
    assert order[0].name == "baseline"
    assert [point.healed for point in order] == [False] * 7 + [True] * 6
    assert [point.n for point in order[1:7]] == [3, 3, 1, 1, 6, 6]


def test_few_bits_stand_between_cuts_and_healing_and_are_read_as_written() -> None:
    whole, cut = Point("baseline", None, 12, ()), Point("angular-03", "angular", 12, (2, 3, 4))
    typed = [point.made_into(kind) for kind in ("nf4", "int8") for point in (cut, whole)]
    order = in_order([cut.made_into("healed"), *typed, cut, whole])
    names = ["baseline-nf4", "baseline-int8", "baseline", "angular-03", "angular-03-int8", "angular-03-nf4"]
    assert sorted(point.name for point in order[:3]) == sorted(names[:3])
    assert [point.name for point in order[3:]] == [*names[3:], "angular-03-healed"]
    for point in order:
        assert Point.from_data(point.to_data()) == point
        assert point.unhealed in ("baseline", "angular-03") and point.folder is point.healed
    old = {key: value for key, value in cut.to_data().items() if key != "quantization"}
    assert Point.from_data(old) == cut
    for change in (
        {"quantization": "int8"},
        {"name": "angular-03-int8"},
        {"name": "angular-03-int8", "quantization": "nf4"},
    ):
        with pytest.raises(ValueError, match="otherwise than its name"):
            Point.from_data(cut.to_data() | change)


@pytest.mark.parametrize("processes", [1, 2, 3, 50])
def test_processes_share_all_points(processes: int) -> None:
    points = _points()
    parts = shares(points, processes)
    assert len(parts) <= processes
    assert sorted(point.name for part in parts for point in part) == sorted(point.name for point in points)
    for part in parts:
        names = {point.name for point in part}
        assert all(point.unhealed in names for point in part)


def test_healed_points_alone_are_shared_too() -> None:
    healed = [point for point in _points() if point.healed]
    assert sorted(point.name for part in shares(healed, 2) for point in part) == sorted(point.name for point in healed)


def test_a_process_gets_the_same_settings() -> None:
    from pathlib import Path

    settings = SweepSettings(
        tasks="lmprune_demo", share=False, launcher="print", processes=2, heal="quick", heal_steps=9
    )
    words = arguments("demo", Path("run"), settings, DataSettings(data="demo"), _points()[:2])
    assert words[:6] == ["sweep", "demo", "-o", "run", "--points", "baseline,angular-01"]
    pairs = set(itertools.pairwise(words))
    assert {("--tasks", "lmprune_demo"), ("--heal", "quick"), ("--heal-steps", "9"), ("--data", "demo")} <= pairs
    assert "--no-share" in words and "--launcher" not in words and "--processes" not in words


def _score(
    value: float, *, generative: bool, chance: float = 0.0, stderr: float = 0.01, documents: int | None = None
) -> Score:
    return Score("t", "m", value, stderr, True, generative, chance, documents)


@pytest.mark.parametrize(
    ("knowledge", "reasoning", "warns"), [(0.85, 0.3, True), (0.85, 0.79, False), (0.5, 0.1, False), (0.9, 0.8, False)]
)
def test_the_gate(knowledge: float, reasoning: float, warns: bool) -> None:
    whole = {"k": _score(0.9, generative=False, chance=0.25), "r": _score(0.8, generative=True)}
    cut = {"k": _score(knowledge, generative=False, chance=0.25), "r": _score(reasoning, generative=True)}
    verdict = Gate().judge(whole, cut)
    assert verdict.knowledge and verdict.knowledge.value == pytest.approx((knowledge - 0.25) / 0.65)
    assert verdict.reasoning and verdict.reasoning.value == pytest.approx(reasoning / 0.8)
    assert verdict.warns is warns
    sentence = verdict.sentence("Dropping 3 of 12 layers")
    assert sentence.count(".") == 1 and ("do not use it" in sentence) is warns


def test_a_share_within_its_noise_is_no_verdict() -> None:
    """Seven of eight documents against six: 117 %, and nothing is known."""
    whole = {"k": _score(0.9, generative=False), "r": _score(6 / 8, generative=True, stderr=0.16, documents=8)}
    cut = {"k": _score(0.9, generative=False), "r": _score(7 / 8, generative=True, stderr=0.13, documents=8)}
    verdict = Gate().judge(whole, cut)
    assert verdict.holds is None and not verdict.warns
    assert "117 ± " in verdict.sentence("It")
    assert "no verdict" in verdict.sentence("It", "the largest")
    many = {name: replace(score, stderr=0.001, documents=9000) for name, score in whole.items()}
    assert Gate().judge(many, many).holds is True


def test_all_right_of_few_is_no_certainty() -> None:
    assert _score(1.0, generative=True, stderr=0.0, documents=8).noise == pytest.approx(0.1076, abs=1e-4)
    assert _score(0.5, generative=True, stderr=0.0, documents=10_000).noise == pytest.approx(0.005, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_noise_of_a_share_is_that_of_many_draws(seed: int) -> None:
    """Of models that answer different documents; of the same documents the true noise is smaller."""
    rng, count, shares = np.random.default_rng(seed), 400, []
    for _ in range(300):
        right = rng.binomial(count, [0.8, 0.6]) / count
        pair = [{"k": _score(v, generative=False, chance=0.25, stderr=(v * (1 - v) / count) ** 0.5)} for v in right]
        found = Gate().judge(*pair).knowledge
        assert found is not None
        shares.append((found.value, found.error))
    values, errors = np.array(shares).T
    assert values.std() == pytest.approx(errors.mean(), rel=0.15)


def test_a_model_that_guesses_is_not_judged() -> None:
    whole = {"k": _score(0.26, generative=False, chance=0.25), "r": _score(0.0, generative=True)}
    assert "nothing can be said" in Gate().judge(whole, whole).sentence("This")
    with pytest.raises(UsageError, match="--knowledge-holds 2"):
        Gate(holds=2)


def test_a_cut_is_repaired_before_it_is_healed() -> None:
    cut = Point("angular-03", "angular", 12, (2, 3, 4))
    repaired, healed = cut.made_into("repaired"), cut.made_into("healed")
    assert (repaired.name, repaired.unhealed, repaired.made) == ("angular-03-repaired", cut.name, "repaired")
    assert cut.stage < repaired.stage < healed.stage
    assert in_order([healed, repaired, cut]) == [cut, repaired, healed]
    for point in (cut, repaired, healed):
        assert Point.from_data(point.to_data()) == point
    with pytest.raises(ValueError, match="otherwise than its name"):
        Point.from_data(cut.to_data() | {"repaired": True})
    assert shares([cut, repaired, healed], 1) == [[cut, repaired, healed]]
