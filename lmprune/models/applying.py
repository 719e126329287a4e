"""A recipe meets the model it is applied to: do they belong together, and what is the plan there?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmprune.errors import RecipeError
from lmprune.models.checkpoint import Checkpoint
from lmprune.models.fields import layer_count
from lmprune.models.locate import DEMO, ModelFolder, locate
from lmprune.plan import LayerPlan
from lmprune.recipe import Recipe


def plan_for(recipe: Recipe, base: ModelFolder, config: Mapping[str, Any]) -> LayerPlan:
    """The plan of ``recipe`` on the model in ``base``, whose resolved config is ``config``.

    Raises:
        RecipeError: the recipe was made for another model.
    """
    plan = recipe.plan_for(layer_count(config))
    if recipe.fingerprint is None:
        other = _names_another(recipe.model, base)
    else:
        other = Checkpoint.open(base.path).fingerprint != recipe.fingerprint
    if other:
        raise RecipeError(
            f"this recipe was made for other weights ({recipe.model}) than those of {base.name}. "
            f"Make one for this model with `lmprune recipe {base.name} -o recipe.yml`"
        )
    return plan


def _names_another(model: str, base: ModelFolder) -> bool:
    """Whether a recipe without a fingerprint plainly names another model than ``base``."""
    if model == base.name:
        return False
    if model == DEMO or Path(model).is_dir():
        named = locate(model).path
        return named != base.path and Checkpoint.open(named).fingerprint != Checkpoint.open(base.path).fingerprint
    return base.name != DEMO and not Path(base.name).is_absolute()
