"""A model, cut like this: the one type for whatever a user may give in a model's place, and the one way to open it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmprune import hub
from lmprune.cuts import library
from lmprune.cuts.beside import LARGEST, files_of
from lmprune.cuts.lineage import LINEAGE, Base, Lineage
from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe, is_recipe_file
from lmprune.errors import ModelError, RecipeError, UsageError, shown
from lmprune.files import as_path
from lmprune.models.carrying import check_depth, cut_config
from lmprune.models.checkpoint import Checkpoint, read_config
from lmprune.models.companions import companions
from lmprune.models.fields import layer_count
from lmprune.models.gguf import SUFFIX
from lmprune.models.locate import (
    ADAPTER,
    DEMO,
    RECIPE,
    ModelFolder,
    demo_folder,
    first_files,
    locate,
    locate_adapter,
    locate_here,
    repository,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Origin:
    """The unpruned model that weights come from, and what is missing from it.

    Attributes:
        base: None where it is not known or cannot be found.
        plan: None for a model that nobody pruned, or that does not say.
        problem: why ``base`` is None.
    """

    base: ModelFolder | None = None
    plan: Plan | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Cut:
    """A base, and what is left out of it while it is read. Opened by `open_cut`; loads nothing until it is asked.

    Attributes:
        base: the folder that weights are read from.
        plan: what is left out; None where the folder is taken as it stands, pruned before or not.
        recipe: where the plan was read.
        name: what a user calls it: opening that again gives the same cut.
        adapter: what a repair adds: an adapter trained on the cut model, attached after the cut.
    """

    base: ModelFolder
    plan: Plan | None = None
    recipe: Recipe | None = None
    name: str = ""
    adapter: Path | None = None
    trust_remote_code: bool = False

    # --- what it is ---------------------------------------------------------------------------------------------

    @cached_property
    def whole_config(self) -> PreTrainedConfig:
        """The base's config with every default resolved."""
        from lmprune.models.loading import load_config

        return load_config(self.base.path, trust_remote_code=self.trust_remote_code)

    @property
    def live_config(self) -> PreTrainedConfig:
        """`config` as the host's class, which the live model is built from."""
        return self.whole_config if self.plan is None else type(self.whole_config).from_dict(dict(self.config))

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The resolved config of what is left, as plain data.

        Raises:
            ModelError: no config describes it.
        """
        return cut_config(self.whole_config.to_dict(), self.plan)

    @property
    def stored_config(self) -> Mapping[str, Any] | None:
        """``config.json`` as it is in the folder; None where a plan changes it."""
        return read_config(self.base.path) if self.plan is None else None

    @property
    def layers(self) -> int:
        """Layers that are left."""
        return layer_count(self.config)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The base's tensors.

        Raises:
            ModelError: they cannot be read, or are of more layers than the config says.
        """
        found = Checkpoint.open(self.base.path)
        check_depth(found.tensors, self.whole_config.to_dict())
        return found

    @property
    def fingerprint(self) -> str:
        """Of the weights, the plan and the adapter together."""
        said = [self.checkpoint.fingerprint]
        if self.plan is not None:
            said += [str(self.plan.kept), *map(str, self.plan.parts)]
        if self.adapter is not None:
            said += [Checkpoint.of_files(self.adapter, sorted(self.adapter.glob("*.safetensors"))).fingerprint]
        return " ".join(said)

    @property
    def window(self) -> int | None:
        """Tokens that the model reads at most; None where it names no limit."""
        from lmprune.models.loading import context_window

        return context_window(self.whole_config)

    # --- where it comes from ------------------------------------------------------------------------------------

    @cached_property
    def folder_lineage(self) -> Lineage | None:
        """What the base's folder says of itself.

        Raises:
            ModelError: it cannot be read, or speaks of another model than the config beside it.
        """
        found = Lineage.read(self.base.path)
        if found is not None and found.plan is not None:
            count = layer_count(self.whole_config.to_dict())
            if count != len(found.plan.kept):
                raise ModelError(
                    f"{self.base.path / LINEAGE} speaks of {len(found.plan.kept)} layers, but config.json of {count}. "
                    "Prune again, or remove it"
                )
        return found

    @property
    def lineage(self) -> Lineage:
        """What results of this cut say of where they come from."""
        if self.plan is None:
            return self.folder_lineage or Lineage()
        base = Base(self.base.name, self.base.revision, self.checkpoint.fingerprint)
        made = Lineage(base=base, plan=self.plan)
        if self.recipe is not None:
            made = Lineage.of_cut(self.recipe, base, self.plan)
        told = self.folder_lineage
        return replace(made, quantization=told.quantization) if told is not None else made

    @cached_property
    def origin(self) -> Origin:
        """The unpruned model; of a checkpoint that was pruned before, the one that its history names."""
        if self.plan is not None:
            return Origin(self.base, self.plan)
        told = self.folder_lineage
        if told is None or told.plan is None:
            return Origin(problem=f"{self.name} is not a pruned model of lmprune")
        if told.base.model is None:
            return Origin(None, told.plan, "its history does not name its base")
        if self.base.revision is not None and not all(map(_is_public, told.base.model.split("+"))):
            return Origin(
                None, told.plan, f"its history names the base {shown(told.base.model)}, which is not on the Hub"
            )
        try:
            base = locate_here(told.base.model, told.base.revision)
            same = Checkpoint.open(base.path).fingerprint == told.base.fingerprint
        except ModelError as exc:
            return Origin(None, told.plan, f"its base {shown(told.base.model)} cannot be found ({exc})")
        if not same:
            return Origin(None, told.plan, f"{told.base.model!r} no longer holds the weights that were cut")
        return Origin(base, told.plan)

    @property
    def is_demo(self) -> bool:
        """Whether this is the demo model, or was cut from it, however often."""
        if self.base.path == demo_folder():
            return True
        told = self.folder_lineage
        return told is not None and told.base.model == DEMO

    @property
    def default_data(self) -> str:
        """The calibration text where none is named."""
        return DEMO if self.is_demo else "c4"

    # --- the live model -----------------------------------------------------------------------------------------

    def load(self, **how: Any) -> PreTrainedModel:
        """The model in eval mode; ``how`` is that of `lmprune.models.loading.load_model`."""
        from lmprune.models.loading import load_model

        model = load_model(self.base.path, plan=self.plan, trust_remote_code=self.trust_remote_code, **how)
        if self.adapter is None:
            return model
        from lmprune.models.adapters import attach_adapter

        attached: PreTrainedModel = attach_adapter(model, str(self.adapter), self.base.path, self.plan)
        return attached

    def dtype(self, asked: str = "auto") -> torch.dtype:
        """The type that `load` loads in where ``asked`` is asked for."""
        from lmprune.models.loading import decoder_config, dtype_of, model_class

        config = self.live_config
        cls = model_class(config, trust_remote_code=self.trust_remote_code)
        return dtype_of(asked, decoder_config(config, cls), self.checkpoint)

    def empty(self) -> PreTrainedModel:
        """The model without weights, on the meta device."""
        from lmprune.models.loading import empty_model

        return empty_model(self.live_config)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer."""
        from lmprune.models.loading import load_tokenizer

        return load_tokenizer(self.base.path, trust_remote_code=self.trust_remote_code)

    # --- further cuts -------------------------------------------------------------------------------------------

    def without(self, plan: Plan | None, name: str, recipe: Recipe | None = None) -> Cut:
        """This model without what ``plan`` drops of it."""
        if plan is None:
            return self
        whole = self.plan.then(plan) if self.plan is not None else plan
        further = Cut(self.base, whole, recipe, name, None, self.trust_remote_code)
        for known in ("checkpoint", "folder_lineage"):  # of the base, and not read again
            if known in self.__dict__:
                further.__dict__[known] = self.__dict__[known]
        return further


def open_cut(
    model: str | Path | Recipe | Cut,
    revision: str | None = None,
    *,
    recipe: str | Path | Recipe | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Cut:
    """Open what a user gives in a model's place.

    Args:
        model: a recipe's file, or its name in the library; a Hub repository, with or without ``@revision``, of a model
            or with a ``recipe.yml``; a checkpoint's folder, pruned or not; ``BASE+ADAPTER``, where the base may be a
            recipe; an adapter's folder that says what it was trained on; ``demo``; a recipe that was read already, or
            a cut that was opened.
        revision: of a model on the Hub.
        recipe: a recipe apart, for ``model`` as its base.

    Raises:
        ModelError, NetworkError: the model cannot be had.
        RecipeError: a recipe is wrong, or was made for other weights.
        UsageError: two recipes, or two revisions, are asked for.
    """
    if isinstance(model, Cut):
        if revision is not None:
            raise UsageError(
                f"revision {revision!r}: {model.name} is opened already. Name the revision when opening it"
            )
        opened = replace(model, trust_remote_code=True) if trust_remote_code else model
    elif isinstance(model, Recipe):
        opened = _of_recipe(model, model.model, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    else:
        opened = _open(str(model), revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    if recipe is None:
        return opened
    if opened.plan is not None:
        raise UsageError(f"{model} is a recipe itself, and recipe={recipe} another. Give the base with one recipe")
    read = recipe if isinstance(recipe, Recipe) else read_recipe(str(recipe))
    name = str(recipe) if not isinstance(recipe, Recipe) else "recipe"
    return _under(opened.base, read, name, opened.trust_remote_code)


def check_name(name: str) -> None:
    """Refuse what `open_cut` could not open, as far as a look at the files of this machine tells; nothing is fetched.

    Raises:
        ModelError, RecipeError: there is no such file or folder, and it is no name of the Hub or of the library; or a
            file is no recipe, or a folder no model.
    """
    path = as_path(name)
    if is_recipe_file(name):
        Recipe.read(path)
    elif path.is_dir():
        if not name:
            locate(name)
        if name != DEMO and not any((path / mark).is_file() for mark in ("config.json", ADAPTER, RECIPE)):
            locate(name)
    elif path.exists():
        if path.suffix != SUFFIX:
            locate(name)
    elif "+" in name:
        base, _, adapter = name.rpartition("+")
        check_name(base)
        if not as_path(adapter).is_dir() and not _is_public(adapter):
            locate_adapter(adapter, name)
    elif library.find(name) is None and not _is_public(name):
        locate(name)


def check_recipe(name: str) -> None:
    """As `check_name`, of what `read_recipe` is given."""
    if as_path(name).exists() or is_recipe_file(name) or not _is_public(name):
        read_recipe(name)


def load(model: str | Path | Recipe | Cut, **how: Any) -> PreTrainedModel:
    """The live model in eval mode, cut as its recipe says, with only what is kept read from disk.

    Args:
        model: whatever `open_cut` opens.
        how: as of `lmprune.models.loading.load_model`: ``dtype``, ``device``, ``device_map``, ``quantization``, ...

    Raises:
        As `open_cut`; ModelError where the weights do not fit their config.
    """
    return open_cut(model).load(**how)


def read_recipe(name: str, *, files: bool = True) -> Recipe:
    """The recipe in a file, of the library by its name, or in a Hub repository as ``recipe.yml``.

    Args:
        files: whether the files that it needs beside it are fetched from the Hub too.

    Raises:
        RecipeError: there is none, or it is wrong.
        NetworkError: it looks like a Hub id but the Hub cannot be reached.
    """
    path = as_path(name)
    if not path.exists() and (shipped := library.find(name)) is not None:
        return Recipe.read(shipped)
    if path.exists() or is_recipe_file(name) or not hub.is_id(hub.split_revision(name)[0]):
        return Recipe.read(path / RECIPE if (path / RECIPE).is_file() else path)
    try:
        found = first_files(name)
    except ModelError as exc:
        raise RecipeError(f"no recipe {name!r} here, and none in a Hub repository of that name: {exc}") from exc
    return _recipe_of(found, name, files=files)


def _recipe_of(found: ModelFolder, name: str, *, files: bool = True) -> Recipe:
    """The recipe in a folder of the Hub's cache."""
    if not (found.path / RECIPE).is_file():
        raise RecipeError(f"{name} holds no {RECIPE}")
    recipe = Recipe.read(found.path / RECIPE)
    _check_foreign(recipe, name)
    for beside in files_of(recipe.parts) if files else ():
        hub.small(found.name, found.revision, [beside.file], LARGEST)
    return recipe


def _check_foreign(recipe: Recipe, name: str) -> None:
    """Refuse what a recipe of somebody else must not name: files of this machine.

    Raises:
        RecipeError: naming it.
    """
    for what, named in (("model", recipe.model), ("base_model", recipe.base_folder)):
        for part in (named or DEMO).split("+"):
            if not _is_public(part):
                raise RecipeError(
                    f"the recipe of {name} names the {what} {shown(part)}, which is neither on the Hub nor the demo. "
                    "Recipes from the Hub may name nothing else"
                )


def _is_public(name: str) -> bool:
    """Whether ``name`` means the same on every machine."""
    return name == DEMO or hub.is_id(hub.split_revision(name)[0])


def _open(name: str, revision: str | None, *, allow_pickle: bool, trust_remote_code: bool) -> Cut:
    path = as_path(name)
    trust = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    if "+" in name and not path.exists():
        base_name, _, adapter_name = name.rpartition("+")
        if is_recipe_file(base_name):
            base = _open(base_name, revision, **trust)
            return Cut(base.base, base.plan, base.recipe, name, locate_adapter(adapter_name, name), trust_remote_code)
    elif is_recipe_file(name):
        return _of_recipe(Recipe.read(path), str(path.resolve()), **trust)
    elif path.is_dir() and not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            return _of_adapter(path.resolve(), trust_remote_code)
        if (path / RECIPE).is_file():
            return _of_recipe(Recipe.read(path / RECIPE), str(path.resolve()), **trust)
    elif not path.exists() and (shipped := library.find(name)) is not None:
        return _of_recipe(Recipe.read(shipped), name, **trust)
    elif not path.exists() and hub.is_id(hub.split_revision(name)[0]):
        found = first_files(name, revision)
        if not (found.path / "config.json").is_file() and (found.path / RECIPE).is_file():
            pinned = f"{found.name}@{found.revision}" if found.revision else found.name
            cut = _of_recipe(_recipe_of(found, name), pinned, **trust)
            adapted = (found.path / ADAPTER).is_file()
            return replace(cut, adapter=repository(name, revision).path) if adapted else cut
    base_folder = locate(name, revision, allow_pickle=allow_pickle)
    return Cut(base_folder, None, None, base_folder.name, None, trust_remote_code)


def _of_recipe(recipe: Recipe, name: str, *, allow_pickle: bool, trust_remote_code: bool) -> Cut:
    try:
        base = locate(recipe.model, recipe.revision, allow_pickle=allow_pickle)
    except ModelError as exc:
        if not Path(recipe.model).is_absolute():
            raise
        raise RecipeError(
            f"the recipe {name} is of a model that is not where it says: {exc}. Name its place here in `model:` and "
            "`lmprune: model:`, then `lmprune recipe RECIPE --rebase -o NEW.yml` does the rest"
        ) from exc
    return _under(base, recipe, name, trust_remote_code)


def _under(base: ModelFolder, recipe: Recipe, name: str, trust_remote_code: bool) -> Cut:
    whole = Cut(base, None, None, base.name, None, trust_remote_code)
    plan = recipe.plan_for(layer_count(whole.whole_config.to_dict()))
    if recipe.fingerprint is None:
        other = _names_another(recipe.model, base)
    else:
        other = whole.checkpoint.fingerprint != recipe.fingerprint
    if other:
        differs = f": {recipe.fingerprint} then, {whole.checkpoint.fingerprint} now" if recipe.fingerprint else ""
        raise RecipeError(
            f"this recipe was made for other weights ({recipe.model}) than those of {base.name}{differs}. "
            f"Make one for this model with `lmprune recipe {base.name} -o recipe.yml`"
        )
    _check_base_model(base, recipe)
    for beside in files_of(plan.parts):
        beside.content()  # refused here, and not when the model is loaded
    return Cut(base, plan, recipe, name, None, trust_remote_code)


def _check_base_model(base: ModelFolder, recipe: Recipe) -> None:
    """Refuse a ``base_model`` from which mergekit would take another tokenizer than the base's; we always take that.

    Raises:
        RecipeError: it names another model.
    """
    named = recipe.base_folder
    if named is None or named in (recipe.model, base.name, str(base.path)):
        return
    folder = as_path(named)
    if not folder.is_dir():
        # Ours was left behind where the recipe was written, and is made anew for each run.
        if recipe.fingerprint is None:
            raise RecipeError(f"base_model names {shown(named)}, another model than {recipe.model}. Remove it")
        return
    ours, theirs = ({f.name: f.read_bytes() for f in companions(at)} for at in (base.path, folder))
    if other := sorted(name for name in theirs if theirs[name] != ours.get(name)):
        raise RecipeError(
            f"base_model names {named}, whose {other[0]} is not that of {base.name}. Remove it "
            "from the recipe, or write the recipe again"
        )


def _names_another(model: str, base: ModelFolder) -> bool:
    """Whether a recipe without a fingerprint plainly names another model than ``base``."""
    if model == base.name:
        return False
    if model == DEMO or Path(model).is_dir():
        named = locate(model).path
        return named != base.path and Checkpoint.open(named).fingerprint != Checkpoint.open(base.path).fingerprint
    return base.name != DEMO and not Path(base.name).is_absolute()


def _of_adapter(folder: Path, trust_remote_code: bool) -> Cut:
    """The cut model that an adapter was trained on, with the adapter."""
    told = Lineage.read(folder)
    if told is None or told.plan is None or told.base.model is None:
        raise ModelError(f"{folder} is an adapter and does not say of which cut. Give RECIPE+{folder.name}")
    base = locate_here(told.base.model, told.base.revision)
    if Checkpoint.open(base.path).fingerprint != told.base.fingerprint:
        raise ModelError(f"{folder} was trained on a cut of {told.base.model}, which holds other weights now")
    return Cut(base, told.plan, None, str(folder), folder, trust_remote_code)


def safe_name(name: str) -> str:
    """``name`` as a file's name.

    >>> safe_name("org/model@main")
    'org-model-main'
    """
    return re.sub(r"[^\w.-]+", "-", Path(name).name if Path(name).is_absolute() else name)
