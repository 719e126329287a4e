"""Which inputs of a linear map to do without, one after the other, while the others are solved anew each time.

For inputs g (tokens, m) of a map W and H = g'g + ridge, taking out an input p, and solving the others again for what
all of them wrote, adds |W_p|^2 / [H^-1]_pp to the ridge objective; for a group B of inputs tr(W_B' [H^-1_BB]^-1 W_B).
The map that is left and the inverse that is left follow by one update (optimal brain surgeon, Hassibi & Stork 1993), so
that the greedy order costs as much as a few inversions, and gives every number of inputs at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-3
"""In units of the mean of the diagonal of g'g."""
AT_ONCE = 2048
"""Units of a layer from which some go at once: one by one, an order takes their cube in memory traffic."""
SHARE = 256
"""Then this share of them: units / SHARE go at once."""
_COMPACT = 0.85
"""The inverse is made smaller once less than this share of it is still of use."""


@dataclass(frozen=True)
class Elimination:
    """The order in which units go.

    Attributes:
        order: unit numbers, (units,), the first to go first.
        costs: (units,) the squared error once each is gone and the others are solved anew, the ridge's part with it,
            above that of all of them, as a share of the squares of what the map wrote.
        left: the map (m, d_out) once ``stop`` units are left, with zeros for inputs that are gone.
    """

    order: Tensor
    costs: Tensor
    left: Tensor


def at_once(units: int) -> int:
    """How many units go at a time by default: one, unless there are many."""
    return 1 if units < AT_ONCE else max(1, units // SHARE)


def eliminate(
    gram: Tensor, weight: Tensor, units: int, *, ridge: float = RIDGE, stop: int = 0, step: int | None = None
) -> Elimination:
    """Take out units of neighbouring inputs until ``stop`` of them are left.

    Args:
        gram: g'g, (m, m), summed over tokens.
        weight: the map (m, d_out): it writes g ``weight``.
        units: how many there are; each is m / units inputs side by side.
        step: how many go at a time, by what each alone would cost; None: `at_once`. With 1 the order is exactly
            greedy. What is left is solved exactly for any step.
    """
    size, step = len(gram) // units, step or at_once(units)
    inverse, left, written = _prepared(gram.double(), weight.double(), ridge)
    here, alive = torch.arange(units), torch.ones(units, dtype=torch.bool)
    order: list[Tensor] = [torch.empty(0, dtype=torch.long)]
    costs: list[Tensor] = [torch.empty(0, dtype=torch.float64)]
    total, standing = 0.0, units
    while standing > stop:
        scores = _scores(inverse, left, size).masked_fill(~alive, torch.inf)
        chosen = torch.topk(scores, min(step, standing - stop), largest=False, sorted=True).indices
        total += _take_out(inverse, left, _inputs(chosen, size))
        order.append(here[chosen])
        costs.append(torch.full((len(chosen),), total / written if written else 0.0, dtype=torch.float64))
        alive[chosen] = False
        standing -= len(chosen)
        if standing < _COMPACT * len(alive):  # what is gone costs time as long as it is in the way
            stays = _inputs(alive.nonzero()[:, 0], size)
            inverse, left, here = inverse[stays][:, stays], left[stays], here[alive]
            alive = torch.ones(standing, dtype=torch.bool)
    full = torch.zeros_like(weight, dtype=torch.float64)
    full[_inputs(here[alive], size)] = left[_inputs(alive.nonzero()[:, 0], size)]
    return Elimination(torch.cat(order), torch.cat(costs), full)


def _prepared(gram: Tensor, weight: Tensor, ridge: float) -> tuple[Tensor, Tensor, float]:
    """H^-1, the ridge optimum over all inputs, and the squares of what the map writes."""
    mean = float(gram.diagonal().mean())
    penalty = ridge * (mean if mean > 0 else 1.0)
    factor = torch.linalg.cholesky(gram + penalty * torch.eye(len(gram), dtype=torch.float64))
    inverse = torch.cholesky_inverse(factor)
    wanted = gram @ weight
    return inverse, inverse @ wanted, float((weight * wanted).sum())


def _inputs(units: Tensor, size: int) -> Tensor:
    """The inputs of these units."""
    return (units[:, None] * size + torch.arange(size)).flatten()


def _scores(inverse: Tensor, weight: Tensor, size: int) -> Tensor:
    """What each unit alone would cost, (units,); of those that are gone anything."""
    if size == 1:
        return weight.square().sum(1) / inverse.diagonal()
    blocks = inverse.unfold(0, size, size).unfold(1, size, size).diagonal(dim1=0, dim2=1).permute(2, 0, 1)
    parts = weight.view(-1, size, weight.shape[1])
    return (parts * torch.linalg.solve_ex(blocks, parts)[0]).sum((1, 2))


def _take_out(inverse: Tensor, weight: Tensor, gone: Tensor) -> float:
    """Change both, in place, to those without these inputs, whose rows are then of no meaning; what that costs."""
    block, part, across = inverse[gone][:, gone], weight[gone], inverse[:, gone]
    solved = torch.linalg.solve(block, part)
    weight.addmm_(across, solved, alpha=-1)
    inverse.addmm_(across, torch.linalg.solve(block, across.T), alpha=-1)
    return float((part * solved).sum())
