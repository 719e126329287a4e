"""From a choice of layers to a recipe file that plain mergekit can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmprune.base_folder import write_base_folder
from lmprune.errors import ModelError
from lmprune.files import check_output_file, write_text
from lmprune.merge import needs_base_folder
from lmprune.models.checkpoint import Checkpoint, read_config, stored_dtype
from lmprune.models.fields import apply_fields, changed_fields, layer_count
from lmprune.models.locate import ModelFolder
from lmprune.plan import LayerPlan
from lmprune.profiles import Profile
from lmprune.recipe import Recipe


@dataclass(frozen=True)
class WrittenRecipe:
    """A recipe and the files it consists of."""

    recipe: Recipe
    path: Path
    base_folder: Path | None


def write_recipe(
    base: ModelFolder,
    config: Mapping[str, Any],
    plan: LayerPlan,
    out: Path,
    *,
    criterion: str | None,
    choice: Mapping[str, Any],
) -> WrittenRecipe:
    """Write the recipe to ``out``, and beside it a base folder where mergekit needs one.

    Args:
        config: the base's config as resolved plain data.
        choice: what the choice rests on, stored as it is.

    Raises:
        ModelError: the plan cannot be expressed in this architecture's config, or mergekit cannot read the path.
        OutputError: ``out`` cannot be written.
    """
    check_output_file(out)
    assert plan.layers == layer_count(config)
    changed = changed_fields(config, plan.kept)
    raw = read_config(base.path)
    by_name = base.revision is not None and not base.converted
    path = f"{base.name}@{base.revision}" if by_name else str(base.path)
    if path.count("@") > by_name:
        raise ModelError(
            f"{base.path}: mergekit reads '@' in a path as a revision. Move the model to a path without it"
        )
    folder = out.resolve().with_name(out.stem + "-base") if needs_base_folder(raw, changed) else None
    recipe = Recipe(
        model=base.name,
        ranges=tuple(plan.slices()),
        layers=plan.layers,
        revision=base.revision,
        fingerprint=Checkpoint.open(base.path).fingerprint,
        dtype=stored_dtype(raw),
        criterion=criterion,
        choice=choice,
        base_folder=str(folder) if folder else None,
    )
    if folder is not None:
        write_base_folder(base.path, apply_fields(raw, changed), folder)
    write_text(out, recipe.to_yaml(path))
    return WrittenRecipe(recipe, out, folder)


def explain(profile: Profile, plan: LayerPlan) -> dict[str, Any]:
    """What a choice by distance rests on, as plain data for the recipe: distance, certainty and their origin."""
    start, n = plan.dropped[0], len(plan.dropped)
    distance, (low, high) = profile.distance(start, n), profile.interval(start, n)
    certainty = profile.certainty(n)
    return {
        "summary": f"angular distance d({start}, {start + n}) = {distance:.4f}; {certainty.describe()}",
        "start": start,
        "distance": round(distance, 6),
        "interval": [round(low, 6), round(high, 6)],
        "resamples": {str(where): round(share, 4) for where, share in certainty.shares.items()},
        "token": profile.token,
        "samples": profile.samples,
        "data": profile.source,
        "data_hash": profile.data_hash,
        "seed": profile.seed,
    }
