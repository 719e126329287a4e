"""How a choice can be made. Pure: the command line reads its options from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lmprune.errors import UsageError
from lmprune.settings import option


@dataclass(frozen=True)
class ChoiceSettings:
    """By what cuts are judged while one is chosen."""

    PANEL: ClassVar[str] = "Choosing"

    objective: str | None = option(
        None,
        "What a cut is judged by: loss, kl, self, answers, task:NAME, or a mix such as loss+self. Default: the "
        "criterion's own.",
        metavar="O",
    )
    after: str | None = option(
        None,
        "Judge cuts as a method of `lmprune heal` that trains nothing repairs them: best its last round, greedy every "
        "step.",
        metavar="METHOD",
    )
    exact: bool = option(
        False, "Measure every cut on all of the text, also when it is surely worse than another.", flag="--exact"
    )
    loss_samples: int = option(
        128, "Samples that losses are measured on, at most; half as many more judge what was chosen.", metavar="N"
    )
    states: int | None = option(
        None,
        "States of a batch to keep for what cuts have in common, also from step to step; the others are computed "
        "again. Default: as many as a quarter of the free memory holds.",
        metavar="N",
    )
    abreast: int = option(
        1,
        "Cuts that run in one pass, as one larger batch: for a GPU that a batch of text leaves idle. The same but for "
        "rounding.",
        metavar="N",
    )
    max_loss: float | None = option(
        None, "Drop as many layers as unseen text allows whose loss may rise by so much in all.", metavar="X"
    )
    max_increase: float | None = option(
        None, "one-shot: drop every layer without which, alone, the objective rises by less.", metavar="X"
    )

    def __post_init__(self) -> None:
        if self.loss_samples < 1:
            raise UsageError(f"--loss-samples {self.loss_samples}: give a number from 1")
        if self.states is not None and self.states < 0:
            raise UsageError(f"--states {self.states}: give a number from 0")
        if self.abreast < 1:
            raise UsageError(f"--abreast {self.abreast}: give a number from 1")
        for name in ("max_loss", "max_increase"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"--{name.replace('_', '-')} {value}: give nats a token above 0, for example 0.02")
