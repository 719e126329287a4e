"""Speed and memory of models side by side.

``settings``   what can be asked for                      pure
``rows``       what was measured                          pure
``counting``   sizes of a live model
``devices``    what devices tell of themselves
``measuring``  all of it in turns
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lmprune.benching.rows import Bench as Bench
from lmprune.benching.settings import BenchSettings as BenchSettings

if TYPE_CHECKING:
    from lmprune.benching.measuring import bench as bench

__all__ = ["Bench", "BenchSettings", "bench"]


def __getattr__(name: str) -> Any:
    if name == "bench":
        return import_module("lmprune.benching.measuring").bench
    raise AttributeError(f"module 'lmprune.benching' has no attribute {name!r}")
