"""lmprune: find the layers that a language model hardly needs, cut them, heal the cut and prove what is left.

The public names are imported when they are first used, so that ``import lmprune`` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmprune.errors import LmpruneError as LmpruneError
    from lmprune.plan import LayerPlan as LayerPlan
    from lmprune.profiles import Profile as Profile
    from lmprune.profiling import ProfileSettings as ProfileSettings
    from lmprune.profiling import profile as profile
    from lmprune.pruning import prune as prune
    from lmprune.recipe import Recipe as Recipe

__version__ = "0.1.0"

_HOME = {
    "LayerPlan": "lmprune.plan",
    "LmpruneError": "lmprune.errors",
    "Profile": "lmprune.profiles",
    "ProfileSettings": "lmprune.profiling",
    "Recipe": "lmprune.recipe",
    "profile": "lmprune.profiling",
    "prune": "lmprune.pruning",
}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'lmprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
