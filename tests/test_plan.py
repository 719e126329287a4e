from __future__ import annotations

from types import SimpleNamespace

import pytest

from lmprune.criteria import deepest
from lmprune.cuts.plan import Plan, check_count, count_of_fraction, parse_layers, spell
from lmprune.errors import PlanError


def test_slices_are_maximal_half_open_ranges() -> None:
    assert Plan(8, (6, 3, 5, 4)).slices() == [(0, 3), (7, 8)]
    assert Plan(8, (0, 7)).slices() == [(1, 7)]
    assert Plan(8, (1, 3, 5)).kept == (0, 2, 4, 6, 7)


def test_slices_and_plans_are_inverse() -> None:
    for mask in range(1, 255):
        plan = Plan.from_kept(8, [layer for layer in range(8) if mask >> layer & 1])
        assert Plan.from_slices(8, plan.slices()) == plan
        if plan.dropped:
            assert parse_layers(spell(plan.dropped)) == plan.dropped


@pytest.mark.parametrize(
    ("slices", "says"),
    [
        ([(0, 4), (4, 4), (5, 8)], "[4, 4] is empty"),
        ([(0, 4), (3, 8)], "overlaps"),
        ([(0, 9)], "outside"),
        ([(-1, 4)], "outside"),
        ([(4, 8), (0, 4)], "overlaps"),
        ([(6, 2)], "empty"),
    ],
)
def test_impossible_slices_are_named(slices: list[tuple[int, int]], says: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_slices(8, slices)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "dropped", "says"),
    [(8, (8,), "0 to 7"), (8, (-1,), "0 to 7"), (8, (2, 2), "twice"), (4, (0, 1, 2, 3), "at least one must stay")],
)
def test_impossible_plans_are_named(layers: int, dropped: tuple[int, ...], says: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan(layers, dropped)
    assert says in str(caught.value)


def test_layers_are_typed_with_both_ends_included() -> None:
    assert parse_layers("3-5,9") == (3, 4, 5, 9)
    assert parse_layers(" 9 , 3 - 5 ") == (3, 4, 5, 9)
    for wrong in ("", "3-", "a", "5-3", "3-5,4", "1,,2", "-1", "3:5"):
        with pytest.raises(PlanError):
            parse_layers(wrong)


def test_fraction_rounds_and_refuses_none_and_all() -> None:
    assert count_of_fraction(0.25, 12) == 3
    assert count_of_fraction(0.5, 24) == 12
    for fraction in (0.0, 1.0, -0.1, 0.01, 0.99):
        with pytest.raises(PlanError):
            count_of_fraction(fraction, 12)
    for count in (0, 12, -1):
        with pytest.raises(PlanError):
            check_count(count, 12)


@pytest.mark.parametrize(("layers", "count", "dropped"), [(32, 8, range(23, 31)), (12, 11, range(11))])
def test_deepest_keeps_the_last_layer_as_the_paper_does(layers: int, count: int, dropped: range) -> None:
    # The paper's 1-based "L-n to L-1" for L = 32, n = 8 are the 0-based layers 23 .. 30.
    assert deepest.choose(count, SimpleNamespace(layers=layers, protected=frozenset())).plan.dropped == tuple(dropped)  # type: ignore[arg-type]


def test_a_plan_on_what_another_left_is_one_plan_of_the_whole() -> None:
    assert Plan(12, (3, 4)).then(Plan(10, (0, 3, 9))).dropped == (0, 3, 4, 5, 11)
    assert Plan(4, ()).then(Plan(4, (1,))) == Plan(4, (1,))
