"""LoRA on weights in 4 or 8 bits (QLoRA, arXiv 2305.14314), merged into the unquantised weights."""

from __future__ import annotations

from dataclasses import dataclass

from lmprune.errors import UsageError
from lmprune.healing.methods.lora import Lora


@dataclass(frozen=True)
class Qlora(Lora):
    """`Lora` with another default."""

    bits: int = 4

    def check(self, method: str) -> None:
        """As in `Options`."""
        if self.bits == 16:
            raise UsageError("--method qlora --bits 16: qlora is LoRA on quantised weights. Use --bits 4 or 8, or lora")
        super().check(method)
