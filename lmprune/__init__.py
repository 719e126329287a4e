"""lmprune: find the layers that a language model hardly needs, cut them, heal the cut and prove what is left.

    import lmprune

    profile = lmprune.profile("demo", samples=64, max_length=128)
    choice = lmprune.choose("demo", drop=2, profile=profile)
    lmprune.recipe("demo", choice, "recipe.yml")
    lmprune.prune("recipe.yml", "pruned")

The public names are imported when they are first used, so that ``import lmprune`` is cheap. Rooms are named after what
goes on in them, functions after what they do: `lmprune.profile` is a function, `lmprune.profiling` a room.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmprune.choosing import choose as choose
    from lmprune.criteria.evidence import Choice as Choice
    from lmprune.criteria.evidence import Evidence as Evidence
    from lmprune.cuts.lineage import Lineage as Lineage
    from lmprune.cuts.plan import Plan as Plan
    from lmprune.cuts.recipe import Recipe as Recipe
    from lmprune.errors import LmpruneError as LmpruneError
    from lmprune.healing.methods.base import Repairing as Repairing
    from lmprune.models.cut import Cut as Cut
    from lmprune.models.cut import open_cut as open_cut
    from lmprune.profiling import ProfileSettings as ProfileSettings
    from lmprune.profiling import profile as profile
    from lmprune.profiling.distances import Profile as Profile
    from lmprune.settings import option as option
    from lmprune.text.sources import DataSettings as DataSettings
    from lmprune.writing.pruning import prune as prune
    from lmprune.writing.verify import Proof as Proof
    from lmprune.writing.verify import verify as verify

__version__ = "0.1.0"

_HOME = {
    "Choice": "lmprune.criteria.evidence",
    "Cut": "lmprune.models.cut",
    "DataSettings": "lmprune.text.sources",
    "Evidence": "lmprune.criteria.evidence",
    "Lineage": "lmprune.cuts.lineage",
    "LmpruneError": "lmprune.errors",
    "Plan": "lmprune.cuts.plan",
    "Profile": "lmprune.profiling.distances",
    "ProfileSettings": "lmprune.profiling",
    "Proof": "lmprune.writing.verify",
    "Recipe": "lmprune.cuts.recipe",
    "Repairing": "lmprune.healing.methods.base",
    "option": "lmprune.settings",
    "choose": "lmprune.choosing",
    "open_cut": "lmprune.models.cut",
    "profile": "lmprune.profiling",
    "prune": "lmprune.writing.pruning",
    "verify": "lmprune.writing.verify",
}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'lmprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
