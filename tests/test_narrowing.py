"""What goes of a layer's width: the greedy order against a reference, and what must go first and cost nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lmprune.errors import HostError
from lmprune.narrowing import WIDTHS, Inner
from lmprune.narrowing.elimination import eliminate
from lmprune.narrowing.methods import slice as slicing


def _inputs(tokens: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, size, generator=generator, dtype=torch.float64) @ mixed


def _optimum(inputs: np.ndarray, weight: np.ndarray, kept: list[int], ridge: float = 1e-3) -> np.ndarray:
    """The ridge regression of what all inputs write on those kept: by least squares of the stacked system."""
    size = ridge * np.mean(np.square(inputs).sum(0))
    some = inputs[:, kept]
    stacked = np.vstack([some, np.sqrt(size) * np.eye(len(kept))])
    wanted = np.vstack([inputs @ weight, np.zeros((len(kept), weight.shape[1]))])
    return np.linalg.lstsq(stacked, wanted, rcond=None)[0]


@pytest.mark.parametrize(("units", "step"), [(24, 1), (24, 5), (8, 1), (8, 3)])
def test_what_is_left_is_the_ridge_optimum_of_the_kept_set(units: int, step: int) -> None:
    g, weight = _inputs(200, 24), _inputs(24, 6, seed=1)
    found = eliminate(g.T @ g, weight, units, step=step, stop=units // 2)
    size = 24 // units
    gone = {int(unit) for unit in found.order}
    kept = [unit * size + i for unit in range(units) if unit not in gone for i in range(size)]
    assert len(gone) == units - units // 2 and found.left[[i for i in range(24) if i not in kept]].eq(0).all()
    reference = _optimum(g.numpy(), weight.numpy(), kept)
    np.testing.assert_allclose(found.left[kept].numpy(), reference, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("units", [12, 6])
def test_each_step_takes_the_unit_whose_loss_costs_least(units: int) -> None:
    g, weight = _inputs(100, 12), _inputs(12, 4, seed=1)
    found, size = eliminate(g.T @ g, weight, units), 12 // units

    def objective(kept: list[int]) -> float:
        inputs = [unit * size + i for unit in kept for i in range(size)]
        if not inputs:
            return float((g @ weight).square().sum())
        left = _optimum(g.numpy(), weight.numpy(), inputs)
        ridge = 1e-3 * float(g.square().sum(0).mean())
        error = (g @ weight).numpy() - g[:, inputs].numpy() @ left
        return float(np.square(error).sum() + ridge * np.square(left).sum())

    kept, written, began = list(range(units)), float((g @ weight).square().sum()), objective(list(range(units)))
    for unit, cost in zip(found.order.tolist(), found.costs.tolist()):
        tried = {each: objective([k for k in kept if k != each]) for each in kept}
        assert min(tried, key=lambda each: tried[each]) == unit
        assert cost == pytest.approx((tried[unit] - began) / written, rel=1e-6, abs=1e-9)
        kept.remove(unit)


def _inner(g: torch.Tensor, writer: torch.Tensor, units: int | None = None) -> Inner:
    readers = tuple(_inputs(g.shape[1], 5, seed=seed)[: g.shape[1]] for seed in (3, 4))
    return Inner(g.T @ g, writer, readers, units or g.shape[1], len(g))


@pytest.mark.parametrize("name", ["ffn", "activation"])
def test_neurons_that_say_nothing_go_first(name: str) -> None:
    g, writer = _inputs(300, 16), _inputs(16, 6, seed=1)
    g[:, 5] = 0  # never active
    writer[11] = 0  # heard by nobody
    order = WIDTHS[name].order(_inner(g, writer))
    assert {int(unit) for unit in order.units[:2]} == {5, 11}
    if order.costs is not None:
        assert float(order.costs[0]) == pytest.approx(0, abs=1e-12)


def test_a_duplicate_neuron_costs_nothing_once_the_other_is_solved_anew() -> None:
    g, writer = _inputs(300, 16), _inputs(16, 6, seed=1)
    g[:, 9] = 2 * g[:, 4]
    order = WIDTHS["ffn"].order(_inner(g, writer))
    assert int(order.units[0]) in (4, 9) and float(order.costs[0]) < 1e-4
    by_size = WIDTHS["activation"].order(_inner(g, writer))
    assert int(by_size.units[0]) not in (4, 9)  # a score of one neuron cannot see it


def test_groups_go_whole() -> None:
    g, writer = _inputs(300, 16), _inputs(16, 6, seed=1)
    g[:, 8:12] = 0
    order = WIDTHS["groups"].order(_inner(g, writer, units=4))
    assert int(order.units[0]) == 2 and sorted(order.units.tolist()) == [0, 1, 2, 3]
    assert order.kept(2).tolist() == sorted(order.units[2:].tolist())


def test_scores_are_what_their_papers_say() -> None:
    g, writer = _inputs(50, 8), _inputs(8, 3, seed=1)
    inner = _inner(g, writer)
    span = sum(reader.max(1).values + reader.min(1).values.abs() for reader in inner.readers)
    norm = (writer.square().sum(1) + sum(reader.square().sum(1) for reader in inner.readers)).sqrt()
    rms = g.square().mean(0).sqrt() * writer.square().sum(1).sqrt()
    for name, scores in (("peak-to-peak", span), ("magnitude", norm), ("activation", rms)):
        assert WIDTHS[name].order(inner).units.tolist() == scores.argsort().tolist()


def test_directions_that_nothing_uses_come_last() -> None:
    states = _inputs(400, 12)
    basis = torch.linalg.qr(_inputs(12, 12, seed=2))[0]
    flat = states @ basis[:, :9] @ basis[:, :9].T  # three directions are empty
    unit = flat / flat.square().mean(1, keepdim=True).sqrt()
    found = slicing.rotation(*[unit.T @ unit / len(unit)] * 2)
    assert found.kept(9) == pytest.approx(1) and found.kept(8) < 1
    kept = found.directions[:, :9]
    torch.testing.assert_close(flat @ kept @ kept.T, flat, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.directions.T @ found.directions, torch.eye(12, dtype=torch.float64))


def test_another_package_may_offer_a_method(package: object) -> None:
    package("lmprune.widths", "first", "AXIS = 'ffn'\ndef order(inner):\n    return 'an order'\n")  # type: ignore[operator]
    package("lmprune.widths", "none", "AXIS = 'ffn'\n")  # type: ignore[operator]
    assert WIDTHS.find("first").order(None) == "an order"  # type: ignore[arg-type]
    with pytest.raises(HostError, match="'order'"):
        WIDTHS.find("none")
