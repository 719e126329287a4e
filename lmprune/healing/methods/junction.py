"""The layers on both sides of each cut train (cutoff endpoint tuning of CLP, arXiv 2510.23652)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmprune.cuts.plan import Plan, runs
from lmprune.errors import UsageError
from lmprune.healing.methods.base import Training

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Junction(Training):
    """The layers that never met before."""

    def check_model(self, model: nn.Module, cut: Plan | None) -> None:
        """The cut must be known."""
        beside_cut(cut)

    def prepare(self, model: nn.Module, cut: Plan | None, seed: int) -> tuple[nn.Module, list[str]]:
        """The layers beside the cut."""
        from lmprune.models.stack import find_stack

        layers = find_stack(model).layers
        for place in beside_cut(cut):
            layers[place].requires_grad_(True)
        return model, []


def beside_cut(cut: Plan | None) -> list[int]:
    """Layers of the pruned model that meet at a cut, ascending.

    >>> beside_cut(Plan(12, (5, 6, 7)))
    [4, 5]
    """
    if cut is None:
        raise UsageError(
            "--method junction needs to know where the cut is, and this model does not say. Heal from its recipe"
        )
    place = {old: new for new, old in enumerate(cut.kept)}
    sides = {side for start, stop in runs(cut.dropped) for side in (start - 1, stop)}
    return sorted(place[side] for side in sides if side in place)
