"""Choosing: the evidence that criteria ask for, made when they ask; the choice; and the recipe file that carries it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lmprune.criteria import CRITERIA
from lmprune.criteria.evidence import Choice
from lmprune.cuts.plan import Plan, checked_layers, count_asked
from lmprune.cuts.recipe import Recipe
from lmprune.errors import DataError, ModelError, RecipeError, UsageError
from lmprune.files import check_output_file, write_text
from lmprune.models.carrying import cut_fields
from lmprune.models.checkpoint import read_config, stored_dtype
from lmprune.models.cut import Cut, open_cut
from lmprune.models.fields import apply_fields
from lmprune.profiling.distances import Profile
from lmprune.profiling.settings import ProfileSettings
from lmprune.text.sources import DataSettings
from lmprune.writing.base_folder import is_base_folder, write_base_folder
from lmprune.writing.mergekit import needs_base_folder
from lmprune.writing.support import best_writer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lmprune.forward.loss import Losses
    from lmprune.text.tokens import Tokens


LEAST_JUDGED = 8
"""Samples apart, on which what was chosen is judged; a quarter of the others where that is more."""


class ModelEvidence:
    """`lmprune.criteria.Evidence` of ``cut``, made by forward passes when it is asked for, and kept.

    Args:
        settings: how states are measured, and on how many samples; losses are measured on the same ones.
        data: the calibration text.
        known: a profile of the model, instead of making one.
        profile_file: where a profile that is made is kept, and found again if it is the one that would be made.
        protect: layers that must stay; -1 is the last.
    """

    def __init__(
        self,
        cut: Cut,
        settings: ProfileSettings | None = None,
        data: DataSettings | None = None,
        *,
        known: Profile | None = None,
        profile_file: Path | None = None,
        protect: Iterable[int] = (),
    ) -> None:
        if known is not None and known.layers != cut.layers:
            raise RecipeError(f"this is a profile of {known.layers} layers, but {cut.name} has {cut.layers}")
        if known is not None and known.fingerprint not in (None, cut.fingerprint):
            raise RecipeError(f"this profile was made from other weights than those of {cut.name}")
        self.cut, self.layers = cut, cut.layers
        self._settings, self._data = settings or ProfileSettings(), data or DataSettings()
        self._known: dict[Plan | None, Profile] = {None: known} if known is not None else {}
        self._profiles: dict[Plan | None, Profile] = dict(self._known)
        self.losses_asked = self.profiles_made = 0
        self._profile_file = profile_file
        self.protected, self.seed = checked_layers(protect, cut.layers, "--protect"), self._settings.seed

    def prepare(self) -> None:
        """Load the model and read the text now, not when the first question comes."""
        _ = self._model, self._texts

    def fresh(self) -> ModelEvidence:
        """The same of the same loaded model, with nothing measured yet."""
        other = copy.copy(self)
        other._profiles, other.losses_asked, other.profiles_made = dict(self._known), 0, 0
        return other

    @property
    def read_nothing(self) -> bool:
        """Whether neither text nor the settings of a measurement have had any meaning so far."""
        return "_texts" not in vars(self) and not self.profiles_made

    @property
    def has_profile(self) -> bool:
        """Whether the model's own profile is there already."""
        return None in self._profiles

    def profile(self, plan: Plan | None = None) -> Profile:
        """See `Evidence`."""
        from lmprune.profiling.run import profile_model

        if plan not in self._profiles:
            self._require_own_code_stays()
            path = self._profile_file if plan is None else None
            cut = self.cut.without(plan, self.cut.name)
            self._profiles[plan] = profile_model(cut, path, self._settings, self._data, reuse=True)
            self.profiles_made += 1
        return self._profiles[plan]

    def losses(self, plans: Sequence[Plan]) -> Losses:
        """See `Evidence`."""
        from lmprune.forward.loss import losses

        self.losses_asked += len(plans)
        return losses(self._model, plans, self._texts[0])

    def judged(self, plans: Sequence[Plan]) -> Losses:
        """See `Evidence`."""
        from lmprune.forward.loss import losses

        return losses(self._model, plans, self._texts[1])

    def states(self, places: Sequence[int], plan: Plan | None = None) -> Iterator[Mapping[int, NDArray[np.float32]]]:
        """See `Evidence`."""
        from lmprune.forward.states import states

        return states(self._model, self._texts[0], places, plan=plan)

    def weights(self) -> Iterator[tuple[int, str, NDArray[np.float32]]]:
        """See `Evidence`."""
        from lmprune.models.stack import find_stack

        for layer, module in enumerate(find_stack(self._model).layers):
            for name, parameter in module.named_parameters():
                yield layer, name, parameter.detach().float().cpu().numpy()

    def gradients(self) -> Iterator[tuple[int, str, NDArray[np.float32], NDArray[np.float32]]]:
        """See `Evidence`."""
        from lmprune.forward.states import gradients

        return gradients(self._model, self._texts[0])

    @cached_property
    def _model(self) -> PreTrainedModel:
        from lmprune.forward.machine import pick_device

        self._require_own_code_stays()
        how = self._settings
        place = {"device_map": how.device_map} if how.device_map else {"device": str(pick_device(how.device))}
        return self.cut.load(dtype=how.dtype, quantization=how.quantization, **place)

    @cached_property
    def _texts(self) -> tuple[Tokens, Tokens]:
        """What is chosen on, the samples that a profile is made of, and what is judged on: those that follow them."""
        from lmprune.profiling.run import calibration_tokens

        samples = self._settings.samples
        wanted = replace(self._settings, samples=samples + max(LEAST_JUDGED, samples // 4))
        every = calibration_tokens(self.cut, wanted, self._data)
        samples = min(samples, every.samples * 4 // 5)
        if not samples or every.samples - samples < 1:
            raise DataError(
                f"{every.source} holds {every.samples} samples: too few to choose on some and judge on others"
            )
        return every.take(samples), replace(every, rows=every.rows[samples:])

    def _require_own_code_stays(self) -> None:
        if self.cut.trust_remote_code:
            raise UsageError("profiling does not run a model's own code. Give --layers or --criterion deepest")


def choose(
    model: str | Path | Recipe | Cut,
    criterion: str = "angular",
    *,
    drop: int | None = None,
    fraction: float | None = None,
    settings: ProfileSettings | None = None,
    data: DataSettings | None = None,
    profile: Profile | None = None,
    profile_file: Path | None = None,
    protect: Iterable[int] = (),
    evidence: ModelEvidence | None = None,
) -> Choice:
    """Choose which layers of ``model`` to drop.

    Args:
        model: whatever `open_cut` opens.
        criterion: a name in `CRITERIA`.
        drop, fraction: how many layers go, as a number or as a share; one of the two.
        settings, data, profile, profile_file, protect: as of `ModelEvidence`.
        evidence: made before, to choose again without measuring again; the five above have no meaning then.

    Raises:
        UsageError: there is no such criterion, or it cannot work with these settings.
        PlanError: so many layers cannot go.
        RecipeError: the profile is of another model.
        ModelError, DataError, NetworkError: the model or the text cannot be had.
    """
    chooser = CRITERIA.find(criterion)
    counted = count_asked(drop, fraction)
    cut = evidence.cut if evidence is not None else open_cut(model)
    count = counted(cut.layers)
    if evidence is None:
        asked = replace(settings or ProfileSettings(), drop=count)
        evidence = ModelEvidence(cut, asked, data, known=profile, profile_file=profile_file, protect=protect)
    return replace(chooser.choose(count, evidence), criterion=criterion)


@dataclass(frozen=True)
class WrittenRecipe:
    """A recipe and the files it consists of."""

    recipe: Recipe
    path: Path
    base_folder: Path | None


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
    if needs_base_folder(raw, changed):
        # Named by what the recipe does and written first: a kill leaves the old recipe with its own folder.
        folder = out.resolve().with_name(f"{out.stem}-base-{recipe.hash[:8]}")
        write_base_folder(base.path, apply_fields(raw, changed), folder)
        recipe = replace(recipe, base_folder=str(folder))
    # mergekit takes what follows a + in a name for an adapter.
    plain = best_writer(raw)[0] == "mergekit" and "+" not in path and not whole.parts
    write_text(out, recipe.to_yaml(path, mergekit=plain))
    for old in out.resolve().parent.glob(f"{escape(out.stem)}-base-????????"):
        if old != folder and is_base_folder(old):
            shutil.rmtree(old)
    return WrittenRecipe(recipe, out, folder)


def rebase(recipe: str | Path | Recipe, out: str | Path) -> WrittenRecipe:
    """Write a recipe that came from another machine so that plain mergekit runs it here: paths and base folder anew.

    Raises:
        As `open_cut` and `write_recipe`; RecipeError where it is a model and no recipe.
    """
    cut = open_cut(recipe)
    if cut.recipe is None or cut.plan is None:
        raise RecipeError(f"{cut.name} is a model and no recipe. Give the recipe that should run on this machine")
    known = dict(cut.recipe.choice)
    made: Choice | Plan = cut.plan
    if cut.recipe.criterion is not None:
        made = Choice(cut.plan, str(known.pop("summary", "")), known, cut.recipe.criterion)
    return write_recipe(replace(cut, plan=None, recipe=None), made, out)
