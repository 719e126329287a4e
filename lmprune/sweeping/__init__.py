"""Many cuts of one model, measured: the curve that a user needs before choosing how much to cut.

``settings``  what can be asked for                        pure
``points``    which cuts, in which order                   pure
``folder``    the run folder and what it remembers         pure
``result``    what is in it after a sweep                  pure
``launch``    points for several machines
``run``       profile, recipes, evaluation, healing, speed
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lmprune.sweeping.settings import SweepSettings as SweepSettings

if TYPE_CHECKING:
    from lmprune.sweeping.run import sweep as sweep

__all__ = ["SweepSettings", "sweep"]


def __getattr__(name: str) -> Any:
    if name == "sweep":
        return import_module("lmprune.sweeping.run").sweep
    raise AttributeError(f"module 'lmprune.sweeping' has no attribute {name!r}")
