"""Choosing: the evidence that criteria ask for, made when they ask; the choice; and the recipe file that carries it."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lmprune.criteria import CRITERIA, OWN
from lmprune.criteria.evidence import Choice
from lmprune.criteria.settings import ChoiceSettings
from lmprune.cuts.plan import Plan, checked_layers, count_asked, spell
from lmprune.cuts.recipe import Recipe
from lmprune.errors import DataError, ModelError, RecipeError, UsageError
from lmprune.files import check_output_file, write_text
from lmprune.models.carrying import cut_fields
from lmprune.models.checkpoint import read_config, stored_dtype
from lmprune.models.cut import Cut, open_cut
from lmprune.models.fields import apply_fields
from lmprune.models.fitting import fits, nearest_fitting
from lmprune.models.runtimes import known_runtime
from lmprune.profiling.distances import Profile
from lmprune.profiling.sequential import Race
from lmprune.profiling.settings import ProfileSettings
from lmprune.text.sources import DataSettings
from lmprune.writing.base_folder import is_base_folder, write_base_folder
from lmprune.writing.mergekit import needs_base_folder
from lmprune.writing.support import best_writer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lmprune.forward.journal import Journal
    from lmprune.forward.loss import Losses
    from lmprune.forward.measures import Measures
    from lmprune.text.tokens import Tokens


_say = logging.getLogger("lmprune").info
LOSS = "loss"
"""The objective of a criterion that names none."""
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
        how: by what cuts are judged.
        journal_file: where losses are kept as they come, so that a killed search goes on.
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
        how: ChoiceSettings | None = None,
        journal_file: Path | None = None,
    ) -> None:
        if known is not None and known.layers != cut.layers:
            raise RecipeError(f"this is a profile of {known.layers} layers, but {cut.name} has {cut.layers}")
        if known is not None and known.fingerprint not in (None, cut.fingerprint):
            raise RecipeError(f"this profile was made from other weights than those of {cut.name}")
        self.cut, self.layers = cut, cut.layers
        self._settings, self._data = settings or ProfileSettings(), data or DataSettings()
        self._known: dict[Plan | None, Profile] = {None: known} if known is not None else {}
        self._profiles: dict[Plan | None, Profile] = dict(self._known)
        self.how, self.profiles_made = how or ChoiceSettings(), 0
        self.objective = self.how.objective or LOSS
        self._profile_file, self._lab = profile_file, _Lab(cut, self._settings, self._data, journal_file)
        self.protected, self.seed = checked_layers(protect, cut.layers, "--protect"), self._settings.seed

    def prepare(self) -> None:
        """Load the model and read the text now, not when the first question comes."""
        _ = self._lab.measures

    def fresh(self) -> ModelEvidence:
        """The same of the same loaded model, with nothing measured yet."""
        other = copy.copy(self)
        other._profiles, other.profiles_made = dict(self._known), 0
        other._lab = self._lab.fresh()
        return other

    def by(self, objective: str) -> ModelEvidence:
        """The same, judged by another objective; what is measured is kept by both."""
        from lmprune.forward.objectives import parse_objective

        parse_objective(objective)
        other = copy.copy(self)
        other.objective = objective
        return other

    def close(self, *, done: bool = False) -> None:
        """Let others have the journal; when ``done``, what it was kept for is written, and it is removed."""
        self._lab.close(done)

    @property
    def losses_asked(self) -> int:
        """How many plans' losses were asked for."""
        return self._lab.measures.asked if self._lab.measured else 0

    @property
    def passes(self) -> float:
        """Layers that losses took, in passes of the whole model over the text that is chosen on."""
        return self._lab.measures.passes if self._lab.measured else 0.0

    @property
    def has_profile(self) -> bool:
        """Whether the model's own profile is there already."""
        return None in self._profiles

    def profile(self, plan: Plan | None = None) -> Profile:
        """See `Evidence`."""
        from lmprune.profiling.run import profile_model

        if plan not in self._profiles:
            _require_own_code_stays(self.cut)
            path = self._profile_file if plan is None else None
            cut = self.cut.without(plan, self.cut.name)
            self._profiles[plan] = profile_model(cut, path, self._settings, self._data, reuse=True)
            self.profiles_made += 1
        return self._profiles[plan]

    def losses(self, plans: Sequence[Plan]) -> Losses:
        """See `Evidence`."""
        return self._lab.measures.losses(self.objective, plans)

    def ranked(self, plans: Sequence[Plan]) -> NDArray[np.float64]:
        """See `Evidence`."""
        return self._lab.measures.ranked(self.objective, plans, None if self.how.exact else Race().losers)

    def judged(self, plans: Sequence[Plan]) -> Losses:
        """See `Evidence`."""
        return self._lab.measures.losses(self.objective, plans, judged=True)

    def agreement(self, plans: Sequence[Plan]) -> NDArray[np.float64]:
        """(plans,) on unseen prompts, the share of the whole model's answers that stay right to the last token."""
        return self._lab.measures.agreement(plans)

    def states(self, places: Sequence[int], plan: Plan | None = None) -> Iterator[Mapping[int, NDArray[np.float32]]]:
        """See `Evidence`."""
        from lmprune.forward.states import states

        return states(self._lab.model, self._lab.texts[0], places, plan=plan)

    def weights(self) -> Iterator[tuple[int, str, NDArray[np.float32]]]:
        """See `Evidence`."""
        from lmprune.models.stack import find_stack

        for layer, module in enumerate(find_stack(self._lab.model).layers):
            for name, parameter in module.named_parameters():
                yield layer, name, parameter.detach().float().cpu().numpy()

    def gradients(self) -> Iterator[tuple[int, str, NDArray[np.float32], NDArray[np.float32]]]:
        """See `Evidence`."""
        from lmprune.forward.objectives import parse_objective
        from lmprune.forward.states import gradients

        terms = parse_objective(self.objective)
        if any(term.name == "kl" for term in terms):
            raise UsageError("--objective kl: the whole model does not diverge from itself, so it has no gradient")
        each = [gradients(self._lab.model, self._lab.measures.tokens(term, False)) for term in terms]
        for same in zip(*each):
            layer, name, value, _ = same[0]
            mixed = np.zeros_like(value)
            for term, found in zip(terms, same):
                mixed += np.float32(term.share) * found[3]
            yield layer, name, value, mixed


class _Lab:
    """The live model, its texts, and what was measured: each made when it is first asked for."""

    def __init__(self, cut: Cut, settings: ProfileSettings, data: DataSettings, journal_file: Path | None) -> None:
        self.cut, self._settings, self._data, self._journal_file = cut, settings, data, journal_file

    @property
    def measured(self) -> bool:
        """Whether there is anything."""
        return "measures" in self.__dict__

    def fresh(self) -> _Lab:
        """The same model and texts, with nothing measured."""
        _ = self.measures
        other = copy.copy(self)
        other.__dict__["measures"] = self.measures.fresh()
        return other

    def close(self, done: bool) -> None:
        """Close the journal, or remove it."""
        if "journal" in self.__dict__:
            self.journal.remove() if done else self.journal.close()

    @cached_property
    def model(self) -> PreTrainedModel:
        from lmprune.forward.machine import pick_device

        _require_own_code_stays(self.cut)
        how = self._settings
        place = {"device_map": how.device_map} if how.device_map else {"device": str(pick_device(how.device))}
        return self.cut.load(dtype=how.dtype, quantization=how.quantization, **place)

    @cached_property
    def texts(self) -> tuple[Tokens, Tokens]:
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
        return every.take(samples), every.part(samples)

    @cached_property
    def journal(self) -> Journal:
        from lmprune.forward.journal import Journal

        how = self._settings
        depends = {name: getattr(how, name) for name in ("seed", "batch_size", "device", "dtype", "quantization")}
        identity = {
            "model": self.cut.fingerprint,
            "text": [half.hash for half in self.texts],
            "data": asdict(self._data),
            **depends,
        }
        made = Journal(self._journal_file, identity, resume=how.resume)
        if made.stale:
            _say(f"{self._journal_file} was left by another command: starting anew")
        elif len(made):
            _say(f"going on from {self._journal_file}")
        return made

    @cached_property
    def measures(self) -> Measures:
        from lmprune.forward.measures import Measures

        def gold(task: str, samples: int) -> Tokens:
            from lmprune.evaluation.gold import gold_answers

            length, how = min(self._settings.max_length, self.cut.window or self._settings.max_length), self._settings
            return gold_answers(task, self.cut.tokenizer(), samples=samples, max_length=length, seed=how.seed)

        return Measures(
            self.model, self.cut.tokenizer(), self.texts, gold, seed=self._settings.seed,
            default=self.cut.default_data, journal=self.journal, batch_size=self._settings.batch_size,
        )  # fmt: skip


def _require_own_code_stays(cut: Cut) -> None:
    if cut.trust_remote_code:
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
    how: ChoiceSettings | None = None,
    runtime: str | None = None,
    evidence: ModelEvidence | None = None,
) -> Choice:
    """Choose which layers of ``model`` to drop.

    Args:
        model: whatever `open_cut` opens.
        criterion: a name in `CRITERIA`.
        drop, fraction: how many layers go, as a number or as a share; one of the two.
        settings, data, profile, profile_file, protect, how: as of `ModelEvidence`.
        runtime: choose only among plans that it runs rightly, of `lmprune.models.runtimes.RUNTIMES`.
        evidence: made before, to choose again without measuring again; the six above have no meaning then.

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
        evidence = ModelEvidence(cut, asked, data, known=profile, profile_file=profile_file, protect=protect, how=how)
    judging = _judging(criterion, evidence)
    made = chooser.choose(count, judging)
    if runtime is not None:
        made = _kept_to(known_runtime(runtime), made, judging)
    return replace(made, criterion=criterion)


def _judging(criterion: str, evidence: ModelEvidence) -> ModelEvidence:
    """``evidence`` by the objective that was asked for, or else by the criterion's own."""
    chooser, asked = CRITERIA.find(criterion), evidence.how.objective
    if asked is not None and criterion in OWN and not hasattr(chooser, "OBJECTIVE"):
        able = ", ".join(name for name, other in OWN.items() if hasattr(other, "OBJECTIVE"))
        raise UsageError(f"--objective {asked}: {criterion} does not measure what a cut costs; these do: {able}")
    return evidence.by(asked or str(getattr(chooser, "OBJECTIVE", LOSS)))


def _kept_to(runtime: str, made: Choice, evidence: ModelEvidence) -> Choice:
    """What a criterion chose, or the best of the nearest plans that ``runtime`` runs rightly, and what that costs."""
    config = evidence.cut.config
    if made.plan.parts or fits(config, made.plan, runtime):
        return replace(made, details={**made.details, "runtime": {"name": runtime}})
    plans = nearest_fitting(config, made.plan, runtime, evidence.protected)
    plan = plans[int(evidence.losses(plans).mean().argmin())]
    free, kept = evidence.judged([made.plan, plan]).mean()
    said = (
        f"of the {len(plans)} cuts that keep {runtime}'s pattern and are nearest to {spell(made.plan.dropped)} "
        f"({made.reason}) the one of the lowest loss; that costs {kept - free:+.4f} nats a token on unseen text"
    )
    why = {"name": runtime, "instead_of": list(made.plan.dropped), "cost": round(float(kept - free), 6)}
    return replace(made, plan=plan, reason=said, details={**made.details, "runtime": why})


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
