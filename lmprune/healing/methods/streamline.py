"""LLM-Streamline: each block that goes, and the layer before it, are replaced by one layer (arXiv 2403.19135).

That layer starts as the one before the cut and trains alone: the squared distance of its output from what leaves the
block in the whole model, on states that are computed once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmprune.cuts.plan import Plan
from lmprune.errors import UsageError
from lmprune.healing.methods.base import Repairing, above_zero
from lmprune.settings import option

if TYPE_CHECKING:
    from lmprune.healing.facts import Facts
    from lmprune.healing.repairing import Repair


@dataclass(frozen=True)
class Streamline(Repairing):
    """The weights of least error on a fifth of the text that does not train are kept."""

    layer_epochs: int = option(20, "streamline: times that the layer sees the text.")
    layer_batch_size: int = option(8, "streamline: blocks per step.")
    layer_lr: float = option(1e-3, "streamline: peak learning rate, which falls as a cosine to a quarter of it.")

    @classmethod
    def defaults(cls, facts: Facts) -> dict[str, Any]:
        """Large models: the paper's learning rate."""
        return {"layer_lr": 2e-4} if facts.grown else {}

    def check(self, method: str) -> None:
        """As in `Options`."""
        super().check(method)
        above_zero(self, "layer_epochs", "layer_batch_size", "layer_lr")
        if self.fit_blocks < 2:
            raise UsageError(f"--fit-blocks {self.fit_blocks}: some are held out to choose by; give 2 or more")

    def check_model(self, model: Any, cut: Plan | None) -> None:
        """There must be a layer before the cut."""
        if cut is not None and 0 in cut.dropped:
            raise UsageError("streamline trains the layer before each cut, and this cut starts at layer 0. Use refit")

    def repair(self, work: Repair) -> Mapping[str, Any]:
        """As in `Repairing`."""
        from lmprune.healing.streamlining import streamline

        return streamline(work.student, work.whole, work.plan, work.calibration, self, say=work.say)
