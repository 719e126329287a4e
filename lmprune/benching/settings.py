"""What a measurement of speed can be told. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lmprune.errors import UsageError
from lmprune.settings import option

LEAST_RUNS = 10
"""The protocol of the Lobotomy study: fewer runs give no spread."""


@dataclass(frozen=True)
class BenchSettings:
    """What is measured, and how often."""

    prompts: str = option("128,512", "Prompt lengths, in tokens.", metavar="N,...")
    batches: str = option("1,8", "Batch sizes.", metavar="B,...")
    tokens: int = option(32, "Tokens to decode after each prompt.", metavar="N")
    runs: int = option(LEAST_RUNS, "Measured runs of each model.", metavar="N")
    warmup: int = option(3, "Runs before them that do not count.", metavar="N")
    quant: str | None = option(None, "Also measure each model in these types: nf4, int8 or both.", metavar="Q,...")
    device: str | None = option(None, "cpu, cuda, cuda:1 or mps. Default: the fastest there is.", metavar="D")
    dtype: str = option("auto", "float32, bfloat16, float16, or auto: that of the checkpoint.", metavar="D")

    def __post_init__(self) -> None:
        if self.runs < LEAST_RUNS:
            raise UsageError(
                f"--runs {self.runs}: fewer than {LEAST_RUNS} runs give no spread. Give at least {LEAST_RUNS}"
            )
        if self.warmup < 1:
            raise UsageError(f"--warmup {self.warmup}: the first run is never typical. Give at least 1")
        if self.tokens < 2:
            raise UsageError(f"--tokens {self.tokens}: give at least 2")
        for name in self.quants:
            if name not in ("nf4", "int8"):
                raise UsageError(f"--quant {name!r}: give nf4, int8 or nf4,int8")
        self.sizes("prompts"), self.sizes("batches")

    def sizes(self, field: Literal["prompts", "batches"]) -> list[int]:
        """The numbers of a comma-separated field."""
        words = getattr(self, field).split(",")
        if not all(word.strip().isdecimal() and int(word) for word in words):
            raise UsageError(f"--{field} {getattr(self, field)!r}: give numbers from 1 with commas, as in 1,8")
        return [int(word) for word in words]

    @property
    def quants(self) -> list[Any]:
        """The quantised types."""
        return [word.strip() for word in self.quant.split(",")] if self.quant else []
