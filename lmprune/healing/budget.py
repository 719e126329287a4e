"""How many steps fit into a budget of time. Pure: seconds in, steps out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

EVALUATIONS = 10
"""Of a planned run."""
SPARE = 0.1
"""Of the time for steps, what is not planned: later steps may be slower than the first."""


def spelled(seconds: float) -> str:
    """Minutes and seconds, or hours and minutes.

    >>> spelled(75.4), spelled(5400)
    ('1:15 min', '1:30 h')
    """
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02d} h"


@dataclass(frozen=True)
class Pace:
    """Seconds, measured before the first step.

    Attributes:
        step: an optimizer step.
        held_out: the held-out loss once.
        load: loading the model.
    """

    step: float
    held_out: float
    load: float

    @property
    def end(self) -> float:
        """After the last step: merging, writing and proving load the model a few times, and measure it once."""
        return 4 * self.load + 2 * self.held_out

    def training(self, steps: int, eval_every: int) -> float:
        """Of so many steps with their evaluations, one before the first."""
        return steps * self.step + (1 + -(-steps // eval_every)) * self.held_out

    def steps(self, seconds: float, eval_every: int | None = None) -> int:
        """As many as fit into ``seconds`` that are left, the end included; 0 where none does.

        Without ``eval_every`` they are evaluated `EVALUATIONS` times, or each of them where there are fewer.
        """
        left = (seconds - self.end) * (1 - SPARE) - self.held_out
        if eval_every is not None:
            return max(0, int((left - self.held_out) / (self.step + self.held_out / eval_every)))
        few = int(left / (self.step + self.held_out))
        return max(0, few if few < EVALUATIONS else int((left - EVALUATIONS * self.held_out) / self.step))


@dataclass(frozen=True)
class Course:
    """What a run settles once, before its first step, and keeps for when it goes on.

    Attributes:
        micro_batch: blocks at once on a device.
        steps: those that are planned.
        pace: None where it was not measured.
    """

    micro_batch: int
    steps: int
    pace: Pace | None = None

    def to_data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Course:
        """What `to_data` made."""
        return cls(data["micro_batch"], data["steps"], Pace(**data["pace"]) if data["pace"] else None)
