"""One factor for each channel of the rotated state at each cut, kept as a patch (LinearPatch, arXiv 2505.24680).

With H an orthonormal Hadamard matrix, and y = x H and y' = x' H of the states x that enter the first layer that is gone
and x' that enter the layer after the cut, both in the whole model, x becomes x P, where (the paper's patch)

    P = H diag(s) H',   s_c = sum |y'_c| / sum |y_c| over tokens

The rotation spreads the few large channels of a state over all. Its distilled variant trains the whole of P, and
nothing else, on the whole model's likeliest tokens: KL over these, both sides normalised over them, AdamW at 1e-4
(cosine to a twentieth), weight decay 1e-4. The published code takes the mean of the samples' ratios and keeps P in
float16; here every token counts alike, and P is in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmprune.errors import DataError
from lmprune.healing.methods.base import Patching, above_zero, not_negative
from lmprune.settings import option

if TYPE_CHECKING:
    from torch import Tensor

    from lmprune.healing.repairing import Repair


@dataclass(frozen=True)
class LinearPatch(Patching):
    """Width numbers for each cut; width x width where they are distilled."""

    patch_steps: int = option(0, "Steps that train the patch on the whole model's likeliest tokens; 0 trains nothing.")
    patch_batch_size: int = option(8, "Blocks for each of these steps.")
    patch_lr: float = option(1e-4, "Their peak learning rate.")
    patch_top_k: int = option(100, "How many of the likeliest tokens count.")

    def check(self, method: str) -> None:
        """As in `Options`."""
        super().check(method)
        not_negative(self, "patch_steps")
        above_zero(self, "patch_batch_size", "patch_lr", "patch_top_k")

    @property
    def numbers(self) -> int:
        """As in `Patching`."""
        return 2 if self.patch_steps else 1

    def maps(self, work: Repair) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """As in `Patching`."""
        from lmprune.healing.patching import gaps_of, states_at
        from lmprune.models.hadamard import hadamard
        from lmprune.models.patches import DIAGONAL

        gaps = gaps_of(work.plan)
        totals: list[tuple[Tensor, Tensor]] = []
        for states in states_at(work.whole, gaps, work.calibration):
            rotation = hadamard(states[0][0].shape[-1]).to(states[0][0])
            now = [tuple((state @ rotation).double().abs().sum(0).cpu() for state in pair) for pair in states]
            totals = [(a + x, b + y) for (a, b), (x, y) in zip(totals, now)] if totals else now
        if not totals:
            raise DataError("a repair needs text, and there is none")
        maps = {
            f"{gap.after}.{DIAGONAL}": (after / before.clamp_min(1e-30)).float()
            for gap, (before, after) in zip(gaps, totals)
        }
        noted = {"after": [gap.after for gap in gaps], "mean": [round(float(s.mean()), 6) for s in maps.values()]}
        if not self.patch_steps:
            return maps, noted
        from lmprune.healing.distilling import distilled

        return distilled(work, maps, self), noted | {"distilled_steps": self.patch_steps}
