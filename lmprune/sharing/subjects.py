"""What a name stands for: a recipe, a checkpoint or an adapter, told from its small files. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lmprune import hub
from lmprune.cuts import library
from lmprune.cuts.lineage import LINEAGE, Base, Lineage
from lmprune.cuts.plan import Plan, is_stock
from lmprune.cuts.recipe import Recipe
from lmprune.errors import LmpruneError, RecipeError, nearest
from lmprune.files import as_path
from lmprune.models.checkpoint import read_config
from lmprune.models.cut import read_recipe
from lmprune.models.fields import layer_count
from lmprune.models.locate import DEMO, MERGED, RECIPE, demo_folder, locate

_SMALL = (RECIPE, MERGED, LINEAGE, "config.json", "adapter_config.json")


@dataclass(frozen=True)
class Subject:
    """What a name stands for.

    Attributes:
        kind: ``recipe``, ``checkpoint`` or ``adapter``.
        recipe: None where nothing but `lineage` tells of it.
        lineage: where it comes from; of a recipe, what results of it would say.
        folder: of a checkpoint or an adapter.
        runtimes: runtime -> ``right``, or why it would run another model; filled in by `with_runtimes`.
        counted: whether the number of the uncut model's layers is known; where it is not, the plan has the fewest
            that its recipe allows.
    """

    name: str
    kind: str
    recipe: Recipe | None
    lineage: Lineage
    folder: Path | None = None
    counted: bool = True
    runtimes: Mapping[str, str] = field(default_factory=dict)

    @property
    def plan(self) -> Plan | None:
        """What is missing; None of a model that nobody cut, or that does not say."""
        return self.lineage.plan

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        told, plan = self.lineage, self.plan
        data: dict[str, Any] = {"name": self.name, "kind": self.kind, "base": vars(told.base)}
        if plan is not None:
            data |= {"layers": plan.layers, "kept": list(plan.kept), "dropped": list(plan.dropped)}
            data |= {"parts": {part.kind: part.to_data() for part in plan.parts}} if plan.parts else {}
        said = {"recipe": dict(told.recipe), "writer": told.writer, "proof": told.proof, "healing": told.healing}
        said["runtimes"] = dict(self.runtimes)
        return data | {key: value for key, value in said.items() if value}


def look(name: str) -> Subject:
    """What ``name`` stands for: a file, a folder, a recipe of the library, or a repository on the Hub.

    Raises:
        RecipeError: it is none of them, or nothing in it tells of a cut.
        ModelError, NetworkError: a repository cannot be had, or a history cannot be read.
    """
    path = as_path(name)
    if path.is_dir():
        return of_folder(path, name)
    if path.exists() or path.suffix in (".yml", ".yaml") or library.find(name) is not None:
        return of_recipe(read_recipe(name), name)
    if not hub.is_id(hub.split_revision(name)[0]):
        close = nearest(name, library.names())
        raise RecipeError(f"nothing is called {name!r} here{close}: give a recipe, a checkpoint's folder, or user/name")
    repository, revision = hub.split_revision(name)
    return of_folder(hub.small(repository, revision, _SMALL), name, foreign=True)


def of_recipe(recipe: Recipe, name: str) -> Subject:
    """A recipe that was read."""
    layers = recipe.layers or _layers_of(recipe.model)
    known = layers or max(stop for _, stop in recipe.ranges)
    plan = recipe.plan_for(known)
    base = Base(recipe.model, recipe.revision, recipe.fingerprint)
    return Subject(name, "recipe", recipe, Lineage.of_cut(recipe, base, plan), None, layers is not None)


def of_folder(folder: Path, name: str, *, foreign: bool = False) -> Subject:
    """A folder of weights with its history, or one that holds a recipe alone."""
    kind = next((kind for file, kind in _KINDS if (folder / file).is_file()), "recipe")
    file = next((file for file in (RECIPE, MERGED) if (folder / file).is_file()), None)
    recipe = None
    if file is not None:
        by_name = foreign and kind == "recipe" and file == RECIPE
        recipe = read_recipe(name, files=False) if by_name else Recipe.read(folder / file)
    told = Lineage.read(folder)
    if recipe is None and (told is None or told.plan is None):
        raise RecipeError(f"{name} holds neither {RECIPE} nor {MERGED}, and no {LINEAGE} that tells of a cut")
    if told is not None and told.plan is not None:
        return Subject(name, kind, recipe, told, folder)
    assert recipe is not None
    if kind == "checkpoint" and recipe.layers is None:
        recipe = replace(recipe, layers=_layers_of(recipe.model) or _uncut_layers(recipe, folder))
    found = of_recipe(recipe, name)
    return replace(found, kind=kind, folder=None if kind == "recipe" else folder)


def with_runtimes(subject: Subject) -> Subject:
    """``subject`` with what each runtime makes of it, where its config is on this machine; nothing is fetched."""
    from lmprune.models.cut import Cut, open_cut
    from lmprune.models.runtimes import RIGHT, WRONG
    from lmprune.models.serving import check_cut

    base = subject.lineage.base.model or ""
    try:
        if subject.kind == "checkpoint" and subject.folder is not None:
            cut = open_cut(subject.folder)
        elif subject.plan is not None and (base == DEMO or as_path(base).is_dir()):
            cut = Cut(locate(base), subject.plan)
        else:
            return subject
        if not all(map(is_stock, subject.plan.parts if subject.plan is not None else ())):
            return subject  # no runtime but lmprune's own runs it
        found = check_cut(cut)
    except LmpruneError:  # told by whoever opens it
        return subject
    said = {v.runtime: v.verdict if v.verdict == RIGHT else v.why for v in found if v.verdict in (RIGHT, WRONG)}
    return replace(subject, runtimes=said)


_KINDS = (("adapter_config.json", "adapter"), ("config.json", "checkpoint"))


def _layers_of(model: str) -> int | None:
    """Layers of a model by its name: of a folder's config, or as the library knows it."""
    config = _config_here(model)
    return layer_count(config) if config is not None else library.models().get(model, {}).get("layers")


def model_type(model: str) -> str | None:
    """The architecture of a model by its name, likewise; None where it is not known here."""
    config = _config_here(model)
    return str(config.get("model_type")) if config is not None else library.models().get(model, {}).get("type")


def _config_here(model: str) -> dict[str, Any] | None:
    folder = demo_folder() if model == DEMO else as_path(model)
    return read_config(folder) if (folder / "config.json").is_file() else None


def _uncut_layers(recipe: Recipe, folder: Path) -> int | None:
    """The fewest layers that the uncut model can have, if the checkpoint is what the recipe's ranges give."""
    kept = sum(stop - start for start, stop in recipe.ranges)
    if kept != layer_count(read_config(folder)):
        raise RecipeError(f"{folder} has {layer_count(read_config(folder))} layers, and its {MERGED} keeps {kept}")
    return None
