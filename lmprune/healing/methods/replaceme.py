"""One linear map before each cut, folded into the projection there (ReplaceMe, arXiv 2505.02819); nothing trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lmprune.cuts.plan import Plan
from lmprune.errors import UsageError
from lmprune.healing.methods.base import Repairing, same_stream

if TYPE_CHECKING:
    from lmprune.healing.repairing import Repair


@dataclass(frozen=True)
class ReplaceMe(Repairing):
    """The least-squares map of what the last MLP before the cut writes to what is missing after it."""

    streams: ClassVar[bool] = True

    def check_model(self, model: Any, cut: Plan | None) -> None:
        """There must be a layer before the cut, and the hidden size must be the whole model's."""
        same_stream(cut, "replaceme")
        if cut is not None and 0 in cut.dropped:
            raise UsageError("replaceme changes the layer before each cut, and this one starts at layer 0. Use refit")

    def repair(self, work: Repair) -> Mapping[str, Any]:
        """As in `Repairing`."""
        from lmprune.healing.replaceme import replaceme

        return replaceme(work.student, work.whole, work.plan, work.calibration, say=work.say, kept=work.kept).to_data()
