"""The recipe file that carries a choice, and the base folder that mergekit needs beside some."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path

from lmprune.criteria.evidence import Choice
from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import SUFFIXES, Recipe
from lmprune.errors import ModelError, RecipeError
from lmprune.files import check_output_file
from lmprune.models.carrying import cut_fields, tensor_changes
from lmprune.models.checkpoint import read_config, stored_dtype
from lmprune.models.cut import Cut, open_cut
from lmprune.models.fields import apply_fields
from lmprune.models.mlps import Source
from lmprune.models.sublayers import with_ends
from lmprune.writing.base_folder import is_base_folder, write_base_folder
from lmprune.writing.mergekit import needs_base_folder
from lmprune.writing.support import best_writer


@dataclass(frozen=True)
class WrittenRecipe:
    """A recipe and the files it consists of; ``mergekit`` says that plain mergekit writes the model rightly."""

    recipe: Recipe
    path: Path
    base_folder: Path | None
    mergekit: bool


def write_recipe(model: str | Path | Recipe | Cut, choice: Choice | Plan, out: str | Path) -> WrittenRecipe:
    """Write the recipe of ``choice`` on ``model`` to ``out``, and beside it a base folder where mergekit needs one.

    Args:
        model: what the choice was made for; what is left out of it already is left out by the recipe too.
        choice: what `choose` gave, or a plan made by hand.

    Raises:
        ModelError: the plan cannot be expressed in this architecture's config, or mergekit cannot read the path.
        OutputError: ``out`` cannot be written.
    """
    cut, out = open_cut(model), Path(out)
    made = choice if isinstance(choice, Choice) else None
    plan = choice.plan if isinstance(choice, Choice) else choice
    check_output_file(out, SUFFIXES)
    base = cut.base
    whole = cut.plan.then(plan) if cut.plan is not None else plan
    changed = cut_fields(cut.whole_config.to_dict(), whole)
    tensor_changes(cut.checkpoint.tensors, whole, cut.whole_config.to_dict())  # refused here, not when it is written
    if any(part.kind == "sublayers" for part in whole.parts):
        stored = Source.stored(cut.whole_config.to_dict(), cut.checkpoint.tensors)
        whole = with_ends(whole, [stored, Source.live(replace(cut, plan=None, recipe=None).empty())])
    raw = read_config(base.path)
    by_name = base.revision is not None and not base.converted
    path = f"{base.name}@{base.revision}" if by_name else str(base.path)
    if path.count("@") > by_name:
        raise ModelError(
            f"{base.path}: mergekit reads '@' in a path as a revision. Move the model to a path without it"
        )
    recipe = Recipe.of(
        base.name,
        whole,
        revision=base.revision,
        fingerprint=cut.checkpoint.fingerprint,
        dtype=stored_dtype(raw),
        criterion=made.criterion if made else None,
        choice=made.to_data() if made else {},
    )
    folder = None
    if needs_base_folder(raw, changed) and all(part.mergekit for part in whole.parts):
        # Named by what the recipe does and written first: a kill leaves the old recipe with its own folder.
        folder = out.resolve().with_name(f"{out.stem}-base-{recipe.hash[:8]}")
        write_base_folder(base.path, apply_fields(raw, changed), folder)
        recipe = replace(recipe, base_folder=str(folder))
    # mergekit takes what follows a + in a name for an adapter.
    plain = best_writer(raw)[0] == "mergekit" and "+" not in path and all(part.mergekit for part in whole.parts)
    recipe = recipe.write(out, path, mergekit=plain)
    for old in out.resolve().parent.glob(f"{escape(out.stem)}-base-????????"):
        if old != folder and is_base_folder(old):
            shutil.rmtree(old)
    return WrittenRecipe(recipe, out, folder, plain)


def rebase(recipe: str | Path | Recipe, out: str | Path) -> WrittenRecipe:
    """Write a recipe that came from another machine so that plain mergekit runs it here: paths and base folder anew.

    What a mergekit file by hand does not say, the base's name, revision, fingerprint and depth, is added.

    Raises:
        As `open_cut` and `write_recipe`; RecipeError where it is a model and no recipe.
    """
    cut = open_cut(recipe)
    if cut.recipe is None or cut.plan is None:
        raise RecipeError(f"{cut.name} is a model and no recipe. Give the recipe that should run on this machine")
    known = dict(cut.recipe.choice)
    made: Choice | Plan = cut.plan
    if cut.recipe.criterion is not None or known:
        made = Choice(cut.plan, str(known.pop("summary", "")), known, cut.recipe.criterion)
    return write_recipe(replace(cut, plan=None, recipe=None), made, out)
