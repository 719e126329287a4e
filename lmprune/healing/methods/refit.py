"""What the layers after a cut write is solved anew by ridge regression; nothing trains. By lmprune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lmprune.errors import UsageError
from lmprune.healing.methods.base import Repairing
from lmprune.settings import check_choice, option

if TYPE_CHECKING:
    from lmprune.healing.repairing import Repair

WHAT = ("both", "down")
LAST = ("distribution", "states")


@dataclass(frozen=True)
class Refit(Repairing):
    """Each projection's form and ridge are those that do best on text that the solve has not seen."""

    ridges: str = option("1e-5,1e-4,1e-3,1e-2,1e-1", "Ridges to choose from, in units of the mean squared input.")
    what: str = option("both", "What is solved in each layer: both (o_proj and down_proj) or down.")
    last_for: str = option(
        "distribution",
        "What the last layer is solved for: the whole model's distribution over the next token, or its states.",
    )
    until_layer: int | None = option(
        None, "Last layer to refit, by its number in the whole model. Default: where no more is gained."
    )

    streams: ClassVar[bool] = True

    def check(self, method: str) -> None:
        """As in `Options`."""
        super().check(method)
        check_choice("--what", self.what, WHAT)
        check_choice("--last-for", self.last_for, LAST)
        if not self.values or not all(ridge > 0 for ridge in self.values):
            raise UsageError(f"--ridges {self.ridges!r}: give numbers above 0 with commas, as in 1e-4,1e-2")
        if self.fit_blocks < 2:
            raise UsageError(f"--fit-blocks {self.fit_blocks}: some are held out to choose by; give 2 or more")

    @property
    def values(self) -> tuple[float, ...]:
        """The ridges as numbers; none where they are no numbers."""
        try:
            return tuple(float(word) for word in self.ridges.split(","))
        except ValueError:
            return ()

    def repair(self, work: Repair) -> Mapping[str, Any]:
        """As in `Repairing`."""
        from lmprune.healing.refitting import refit

        return refit(
            work.student, work.whole, work.plan, work.calibration, self, say=work.say, kept=work.kept
        ).to_data()
