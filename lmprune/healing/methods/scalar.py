"""The state at each cut times one number, folded into what writes before it (Prune&Comp, arXiv 2507.18212)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lmprune.cuts.plan import Plan
from lmprune.healing.methods.base import Repairing, same_stream

if TYPE_CHECKING:
    from lmprune.healing.repairing import Repair


@dataclass(frozen=True)
class Scalar(Repairing):
    """The magnitude that the layers which are gone gave the state; nothing trains."""

    def check_model(self, model: Any, cut: Plan | None) -> None:
        """The hidden size must be the whole model's."""
        same_stream(cut, "scalar")

    def repair(self, work: Repair) -> Mapping[str, Any]:
        """As in `Repairing`."""
        from lmprune.healing.scaling import compensate

        scales = compensate(work.student, work.whole, work.plan, work.calibration)
        return {"scales": [asdict(scale) for scale in scales]}
