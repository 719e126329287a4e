"""Everything trains."""

from __future__ import annotations

from dataclasses import dataclass

from lmprune.healing.methods.base import Training


@dataclass(frozen=True)
class Full(Training):
    """All parameters, in float32."""
