"""The best linear map of the state at each cut, kept as a patch (Ghosted Layers, arXiv 2605.15491); nothing trains.

With X the states that enter the first layer that is gone and Y those that enter the layer after the cut, both in the
whole model, tokens by width, x becomes x + x M, where (the paper's closed form, W* = I + M)

    (X'X + ridge) M = X' (Y - X)

The paper adds 1e-6 to the diagonal of X'X; here the ridge is in units of its mean, so that it means the same for every
model. Several cuts have a map each, all found on the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmprune.errors import DataError, UselessRepair
from lmprune.healing.methods.base import Patching, not_negative
from lmprune.settings import option

if TYPE_CHECKING:
    from torch import Tensor

    from lmprune.healing.repairing import Repair


@dataclass(frozen=True)
class Ghost(Patching):
    """A full map: width x width numbers for each cut."""

    ridge: float = option(1e-6, "Ridge of the map, in units of the mean squared state.")

    def check(self, method: str) -> None:
        """As in `Options`."""
        super().check(method)
        not_negative(self, "ridge")

    def maps(self, work: Repair) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """As in `Patching`.

        Raises:
            DataError: there is too little text.
            UselessRepair: a solve has no solution.
        """
        from lmprune.healing.patching import gaps_of, states_at
        from lmprune.healing.solving import Sums, solution
        from lmprune.models.patches import CHANGE

        gaps = gaps_of(work.plan)
        sums: list[Sums] = []
        for states in states_at(work.whole, gaps, work.calibration):
            sums = sums or [Sums.empty(x.shape[-1], x.shape[-1], bias=False) for x, _ in states]
            sums = [each.add(x, y.double() - x.double()) for each, (x, y) in zip(sums, states)]
        sums = [each.settled() for each in sums]
        for each in sums[:1]:
            if each.tokens < 2 * len(each.gram):
                raise DataError(
                    f"ghost solves for a map of width {len(each.gram)}, and there are {each.tokens} tokens: give at "
                    f"least {2 * len(each.gram)}, by --fit-blocks or --max-length"
                )
        found: list[Tensor] = []
        for gap, each in zip(gaps, sums):
            if (solved := solution(each, self.ridge)) is None:
                raise UselessRepair(
                    f"ghost: {each.tokens:,} states before layer {gap.first} leave the solve singular. Give a larger "
                    "--ridge, or more text, and less alike. Nothing was written"
                )
            found.append(solved)
        errors = [round(each.error(change), 6) for each, change in zip(sums, found)]
        maps = {f"{gap.after}.{CHANGE}": change.float() for gap, change in zip(gaps, found)}
        return maps, {"after": [gap.after for gap in gaps], "left": errors, "tokens": sums[0].tokens}
