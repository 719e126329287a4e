"""LoRA on weights in 4 or 8 bits (QLoRA, arXiv 2305.14314), merged into the unquantised weights."""

from __future__ import annotations

from dataclasses import dataclass

from lmprune.healing.methods.lora import Lora
from lmprune.settings import Quantization


@dataclass(frozen=True)
class Qlora(Lora):
    """`Lora` with another default."""

    quantization: Quantization | None = "nf4"
