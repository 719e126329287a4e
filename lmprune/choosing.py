"""From a choice of layers to a recipe file that plain mergekit can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe
from lmprune.errors import ModelError
from lmprune.files import check_output_file, write_text
from lmprune.models.carrying import cut_fields
from lmprune.models.checkpoint import read_config, stored_dtype
from lmprune.models.cut import Cut
from lmprune.models.fields import apply_fields
from lmprune.profiling.distances import Profile
from lmprune.writing.base_folder import write_base_folder
from lmprune.writing.mergekit import needs_base_folder


@dataclass(frozen=True)
class WrittenRecipe:
    """A recipe and the files it consists of."""

    recipe: Recipe
    path: Path
    base_folder: Path | None


def write_recipe(
    cut: Cut,
    plan: Plan,
    out: Path,
    *,
    criterion: str | None,
    choice: Mapping[str, Any],
) -> WrittenRecipe:
    """Write the recipe of ``plan`` on ``cut`` to ``out``, and beside it a base folder where mergekit needs one.

    Args:
        cut: what the plan was chosen for; what is left out of it already is left out by the recipe too.
        choice: what the choice rests on, stored as it is.

    Raises:
        ModelError: the plan cannot be expressed in this architecture's config, or mergekit cannot read the path.
        OutputError: ``out`` cannot be written.
    """
    check_output_file(out)
    base = cut.base
    whole = cut.plan.then(plan) if cut.plan is not None else plan
    changed = cut_fields(cut.whole_config.to_dict(), whole)
    raw = read_config(base.path)
    by_name = base.revision is not None and not base.converted
    path = f"{base.name}@{base.revision}" if by_name else str(base.path)
    if path.count("@") > by_name:
        raise ModelError(
            f"{base.path}: mergekit reads '@' in a path as a revision. Move the model to a path without it"
        )
    folder = out.resolve().with_name(out.stem + "-base") if needs_base_folder(raw, changed) else None
    recipe = Recipe.of(
        base.name,
        whole,
        revision=base.revision,
        fingerprint=cut.checkpoint.fingerprint,
        dtype=stored_dtype(raw),
        criterion=criterion,
        choice=choice,
        base_folder=str(folder) if folder else None,
    )
    if folder is not None:
        write_base_folder(base.path, apply_fields(raw, changed), folder)
    write_text(out, recipe.to_yaml(path))
    return WrittenRecipe(recipe, out, folder)


def explain(profile: Profile, plan: Plan) -> dict[str, Any]:
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
