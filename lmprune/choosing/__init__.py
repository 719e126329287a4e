"""Choosing: the evidence that criteria ask for, made when they ask; the choice; what it costs; and its recipe file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from lmprune.choosing.checking import Check, check, within_budget
from lmprune.choosing.evidence import LOSS, ModelEvidence
from lmprune.choosing.recipes import WrittenRecipe, rebase, write_recipe
from lmprune.choosing.runtime import kept_to
from lmprune.criteria import CRITERIA, OWN, one_shot
from lmprune.criteria.evidence import Choice
from lmprune.criteria.settings import ChoiceSettings
from lmprune.cuts.plan import count_asked
from lmprune.cuts.recipe import Recipe
from lmprune.errors import UsageError
from lmprune.models.cut import Cut, open_cut
from lmprune.models.runtimes import known_runtime
from lmprune.profiling.distances import Profile
from lmprune.profiling.settings import ProfileSettings
from lmprune.text.sources import DataSettings

__all__ = [
    "LOSS",
    "Check",
    "ModelEvidence",
    "WrittenRecipe",
    "check",
    "choose",
    "rebase",
    "write_recipe",
]


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
        drop, fraction: how many layers go, as a number or as a share; one of the two, unless ``how`` says a limit.
        settings, data, profile, profile_file, protect, how: as of `ModelEvidence`.
        runtime: choose only among plans that it runs rightly, of `lmprune.models.runtimes.RUNTIMES`.
        evidence: made before, to choose again without measuring again; the six above have no meaning then.

    Raises:
        UsageError: there is no such criterion, or it cannot work with these settings.
        PlanError: so many layers cannot go.
        RecipeError: the profile is of another model.
        ModelError, DataError, NetworkError: the model or the text cannot be had.
    """
    CRITERIA.find(criterion)
    counted = _counted(criterion, drop, fraction, (evidence.how if evidence is not None else how) or ChoiceSettings())
    cut = evidence.cut if evidence is not None else open_cut(model)
    count = counted(cut.layers) if counted else None
    if evidence is None:
        asked = replace(settings or ProfileSettings(), drop=count)
        evidence = ModelEvidence(cut, asked, data, known=profile, profile_file=profile_file, protect=protect, how=how)
    judging = _judging(criterion, evidence)
    _check_after(criterion, count, judging)
    made = _chosen(criterion, count, judging)
    if runtime is not None:
        made = kept_to(known_runtime(runtime), made, judging)
    details = {"objective": judging.objective} if hasattr(CRITERIA[criterion], "OBJECTIVE") else {}
    details |= {"judged_by": judging.judging} if judging.judging != judging.objective else {}
    details |= {"after": judging.after} if judging.after else {}
    return replace(made, criterion=criterion, details={**details, **made.details})


def _check_after(criterion: str, count: int | None, evidence: ModelEvidence) -> None:
    """Refuse a repair that nothing would be judged after, and say what one costs."""
    if evidence.after is None:
        return
    chooser = CRITERIA[criterion]
    if not hasattr(chooser, "repairs"):
        able = ", ".join(name for name, other in OWN.items() if hasattr(other, "repairs"))
        raise UsageError(f"--after {evidence.after}: {criterion} judges no cut after a repair; these do: {able}")
    evidence.check_repair(chooser.repairs(count) if count is not None else None)


def _counted(
    criterion: str, drop: int | None, fraction: float | None, how: ChoiceSettings
) -> Callable[[int], int] | None:
    """What says how many layers go, as `count_asked`; None where ``how`` says a limit instead."""
    if how.max_increase is not None and criterion != "one-shot":
        raise UsageError(f"--max-increase goes with --criterion one-shot, not {criterion}. For others give --max-loss")
    limits = sum(limit is not None for limit in (how.max_loss, how.max_increase))
    if limits + (drop is not None or fraction is not None) > 1:
        raise UsageError("give one of drop, fraction, max_loss and max_increase: each says how many layers go")
    return None if limits else count_asked(drop, fraction)


def _chosen(criterion: str, count: int | None, evidence: ModelEvidence) -> Choice:
    """Of ``count`` layers, or of as many as the limit allows."""
    chooser, how = CRITERIA[criterion], evidence.how
    if count is not None:
        return chooser.choose(count, evidence)
    if how.max_increase is not None:
        return one_shot.below(how.max_increase, evidence)
    assert how.max_loss is not None, "one of the two is given where no count is"
    return within_budget(how.max_loss, evidence, lambda number: chooser.choose(number, evidence))


def _judging(criterion: str, evidence: ModelEvidence) -> ModelEvidence:
    """``evidence`` by the objective that was asked for, or else by the criterion's own."""
    chooser, asked = CRITERIA.find(criterion), evidence.how.objective
    if asked is not None and criterion in OWN and not hasattr(chooser, "OBJECTIVE"):
        able = ", ".join(name for name, other in OWN.items() if hasattr(other, "OBJECTIVE"))
        raise UsageError(f"--objective {asked}: {criterion} does not measure what a cut costs; these do: {able}")
    if asked is not None:
        return evidence.by(asked)
    own, judged = str(getattr(chooser, "OBJECTIVE", LOSS)), getattr(chooser, "JUDGED_BY", None)
    if "self" in own and evidence.streams:
        logging.getLogger("lmprune").info(
            f"a model that is read layer by layer writes nothing: {criterion} goes by loss"
        )
        own, judged = LOSS, None
    return evidence.by(own, judged)
