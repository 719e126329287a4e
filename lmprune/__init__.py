"""lmprune: find the layers that a language model hardly needs, cut them, heal the cut and prove what is left.

    import lmprune

    profile = lmprune.profile("demo", samples=64, max_length=128)
    choice = lmprune.choose("demo", drop=2, profile=profile)
    lmprune.write_recipe("demo", choice, "recipe.yml")
    lmprune.prune("recipe.yml", "pruned")

The public names are imported when they are first used, so that ``import lmprune`` is cheap. Rooms are named after what
goes on in them, functions after what they do: `lmprune.profile` is a function, `lmprune.profiling` a room.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmprune.benching import Bench as Bench
    from lmprune.benching import BenchSettings as BenchSettings
    from lmprune.benching import bench as bench
    from lmprune.benching.draft_rows import DraftSettings as DraftSettings
    from lmprune.benching.drafting import draft as draft
    from lmprune.choosing import choose as choose
    from lmprune.choosing import rebase as rebase
    from lmprune.choosing import write_recipe as write_recipe
    from lmprune.comparing import Comparison as Comparison
    from lmprune.comparing import compare as compare
    from lmprune.comparing import layer_costs as layer_costs
    from lmprune.criteria.evidence import Choice as Choice
    from lmprune.criteria.evidence import Evidence as Evidence
    from lmprune.criteria.settings import ChoiceSettings as ChoiceSettings
    from lmprune.cuts.lineage import Lineage as Lineage
    from lmprune.cuts.plan import Plan as Plan
    from lmprune.cuts.recipe import Recipe as Recipe
    from lmprune.errors import LmpruneError as LmpruneError
    from lmprune.evaluation.harness import evaluate as evaluate
    from lmprune.healing import HealResult as HealResult
    from lmprune.healing import HealSettings as HealSettings
    from lmprune.healing import heal as heal
    from lmprune.healing.methods.base import Repairing as Repairing
    from lmprune.models.cut import Cut as Cut
    from lmprune.models.cut import load as load
    from lmprune.models.cut import open_cut as open_cut
    from lmprune.profiling import ProfileSettings as ProfileSettings
    from lmprune.profiling import profile as profile
    from lmprune.profiling.distances import Profile as Profile
    from lmprune.reporting import report as report
    from lmprune.settings import option as option
    from lmprune.sharing.pushing import Shared as Shared
    from lmprune.sharing.pushing import push as push
    from lmprune.sweeping import SweepSettings as SweepSettings
    from lmprune.sweeping import sweep as sweep
    from lmprune.text.sources import DataSettings as DataSettings
    from lmprune.text.tokens import Tokens as Tokens
    from lmprune.writing.exporting import export as export
    from lmprune.writing.pruning import PrunedCheckpoint as PrunedCheckpoint
    from lmprune.writing.pruning import prune as prune
    from lmprune.writing.quantizing import QuantizeSettings as QuantizeSettings
    from lmprune.writing.quantizing import quantize as quantize
    from lmprune.writing.verify import Proof as Proof
    from lmprune.writing.verify import verify as verify

__version__ = "0.1.0"

_HOME = {
    "Bench": "lmprune.benching",
    "BenchSettings": "lmprune.benching",
    "Choice": "lmprune.criteria.evidence",
    "ChoiceSettings": "lmprune.criteria.settings",
    "Comparison": "lmprune.comparing",
    "Cut": "lmprune.models.cut",
    "DataSettings": "lmprune.text.sources",
    "DraftSettings": "lmprune.benching.draft_rows",
    "Evidence": "lmprune.criteria.evidence",
    "HealResult": "lmprune.healing",
    "HealSettings": "lmprune.healing",
    "Lineage": "lmprune.cuts.lineage",
    "LmpruneError": "lmprune.errors",
    "Plan": "lmprune.cuts.plan",
    "Profile": "lmprune.profiling.distances",
    "ProfileSettings": "lmprune.profiling",
    "Proof": "lmprune.writing.verify",
    "PrunedCheckpoint": "lmprune.writing.pruning",
    "QuantizeSettings": "lmprune.writing.quantizing",
    "Recipe": "lmprune.cuts.recipe",
    "Repairing": "lmprune.healing.methods.base",
    "Shared": "lmprune.sharing.pushing",
    "SweepSettings": "lmprune.sweeping",
    "Tokens": "lmprune.text.tokens",
    "bench": "lmprune.benching",
    "choose": "lmprune.choosing",
    "compare": "lmprune.comparing",
    "draft": "lmprune.benching.drafting",
    "evaluate": "lmprune.evaluation.harness",
    "export": "lmprune.writing.exporting",
    "heal": "lmprune.healing",
    "layer_costs": "lmprune.comparing",
    "load": "lmprune.models.cut",
    "open_cut": "lmprune.models.cut",
    "option": "lmprune.settings",
    "profile": "lmprune.profiling",
    "prune": "lmprune.writing.pruning",
    "push": "lmprune.sharing.pushing",
    "quantize": "lmprune.writing.quantizing",
    "rebase": "lmprune.choosing",
    "report": "lmprune.reporting",
    "sweep": "lmprune.sweeping",
    "verify": "lmprune.writing.verify",
    "write_recipe": "lmprune.choosing",
}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'lmprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
