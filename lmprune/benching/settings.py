"""What a measurement of speed can be told. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lmprune.errors import UsageError, shown
from lmprune.settings import ALSO_FEW_BITS, check_shared, device_option, dtype_option, option

USUAL_PROMPTS = (128, 512)
LEAST_RUNS = 10
"""The protocol of the Lobotomy study: fewer runs give no spread."""


@dataclass(frozen=True)
class BenchSettings:
    """What is measured, and how often."""

    PANEL: ClassVar[str] = "Measuring"

    prompts: str | None = option(
        None, "Prompt lengths, in tokens. Default: 128 and 512, as far as the models read them.", metavar="N,..."
    )
    batch_sizes: str = option("1,8", "Batch sizes.", metavar="B,...")
    tokens: int = option(32, "Tokens to decode after each prompt.", metavar="N")
    runs: int = option(LEAST_RUNS, "Measured runs of each model.", metavar="N")
    warmup: int = option(3, "Runs before them that do not count.", metavar="N")
    quantizations: str | None = option(None, ALSO_FEW_BITS, metavar="Q,...")
    device: str = device_option()
    dtype: str = dtype_option()

    def __post_init__(self) -> None:
        if self.runs < 1:
            raise UsageError(f"--runs {self.runs}: give a number from 1; fewer than {LEAST_RUNS} give no spread")
        if self.warmup < 1:
            raise UsageError(f"--warmup {self.warmup}: the first run is never typical. Give at least 1")
        if self.tokens < 2:
            raise UsageError(f"--tokens {self.tokens}: give at least 2")
        check_shared(self)
        if self.prompts is not None:
            self.sizes("prompts")
        self.sizes("batch_sizes")

    def sizes(self, field: Literal["prompts", "batch_sizes"]) -> list[int]:
        """The numbers of a comma-separated field."""
        words = getattr(self, field).split(",")
        if not all(word.strip().isdecimal() and int(word) for word in words):
            raise UsageError(
                f"--{field.replace('_', '-')} {shown(getattr(self, field))}: give numbers from 1 with commas, as in 1,8"
            )
        found = [int(word) for word in words]
        if len({*found}) < len(found):
            raise UsageError(f"--{field.replace('_', '-')} {shown(getattr(self, field))}: a number stands twice")
        return found

    def lengths(self, window: int | None) -> list[int]:
        """The prompts; where none are named, those of the usual ones that fit into ``window`` with what is decoded."""
        if self.prompts is not None:
            return self.sizes("prompts")
        most = None if window is None else max(1, window - self.tokens)
        return [length for length in USUAL_PROMPTS if most is None or length <= most] or [most or USUAL_PROMPTS[0]]
