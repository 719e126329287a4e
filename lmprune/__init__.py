"""lmprune: find the layers that a language model hardly needs, cut them, heal the cut and prove what is left.

The public names are imported when they are first used, so that ``import lmprune`` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmprune.cuts.plan import Plan as Plan
    from lmprune.cuts.recipe import Recipe as Recipe
    from lmprune.errors import LmpruneError as LmpruneError
    from lmprune.profiling import ProfileSettings as ProfileSettings
    from lmprune.profiling import profile as profile
    from lmprune.profiling.distances import Profile as Profile
    from lmprune.writing.pruning import prune as prune

__version__ = "0.1.0"

_HOME = {
    "Plan": "lmprune.cuts.plan",
    "LmpruneError": "lmprune.errors",
    "Profile": "lmprune.profiling.distances",
    "ProfileSettings": "lmprune.profiling",
    "Recipe": "lmprune.cuts.recipe",
    "profile": "lmprune.profiling",
    "prune": "lmprune.writing.pruning",
}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'lmprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
