"""``lmprune recipe``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmprune.budgeting.budget import BudgetSettings
from lmprune.cli import show
from lmprune.cli.options import (
    MODEL,
    NOT_JOINED,
    NOT_WALKED,
    AllowPickle,
    Criterion,
    Drop,
    Fraction,
    Protect,
    TrustRemoteCode,
    names_of,
    readable,
    refuse,
    there,
    with_options,
)
from lmprune.criteria.settings import ChoiceSettings
from lmprune.errors import LmpruneError, UsageError
from lmprune.profiling.settings import ProfileSettings
from lmprune.text.sources import DataSettings

if TYPE_CHECKING:
    from lmprune.choosing import ModelEvidence, WrittenRecipe
    from lmprune.criteria import Choice
    from lmprune.models.cut import Cut


def _source_there(given: str | None) -> None:
    """A profile is a file; the rest is a model."""
    readable(Path(given)) if given is not None and given.endswith(".json") else there(given)


@with_options(BudgetSettings, ChoiceSettings, ProfileSettings, DataSettings, useless=(NOT_JOINED, NOT_WALKED))
def recipe(
    output: Annotated[Path, typer.Option("-o", "--output", help="The recipe to write.", metavar="RECIPE.yml")],
    budget: BudgetSettings,
    how: ChoiceSettings,
    settings: ProfileSettings,
    data: DataSettings,
    source: Annotated[
        str | None,
        typer.Argument(metavar="MODEL|PROFILE.json", help=f"{MODEL} Or a profile that was made from it."),
        _source_there,
    ] = None,
    drop: Drop = None,
    fraction: Fraction = None,
    layers: Annotated[
        str | None,
        typer.Option(help="The layers to drop, both ends included: 3-5,9 drops 3, 4, 5 and 9.", metavar="L,..."),
    ] = None,
    protect: Protect = None,
    rebase: Annotated[
        bool, typer.Option("--rebase", help="Write a recipe from another machine so that plain mergekit runs it here.")
    ] = False,
    from_yaml: Annotated[
        str | None,
        typer.Option(help="Add what is missing to a mergekit file that somebody wrote by hand.", metavar="OLD.yml"),
        there,
    ] = None,
    criterion: Criterion = "angular",
    runtime: Annotated[
        str | None,
        typer.Option(help="Choose only cuts that this runtime runs rightly, such as llama.cpp.", metavar="R"),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Measure what the cut costs on unseen text: two more passes.")
    ] = True,
    compensate: Annotated[
        bool,
        typer.Option(
            "--compensate", help="Make up for the size of what is gone: one factor for each cut, by mergekit."
        ),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Choose the layers to drop and write them as a mergekit recipe.

    Given a MODEL, the angular criterion profiles it first and keeps the profile beside the recipe. Given a budget
    (--params, --size or --speed), layers, neurons and hidden size are searched for what costs least.

    Examples:
        lmprune recipe demo --drop 3 -o recipe.yml
        lmprune recipe profile.json --fraction 0.25 -o recipe.yml
        lmprune recipe demo --criterion greedy --max-loss 0.1 --protect 0,-1 -o recipe.yml
        lmprune recipe demo --params 0.75 -o recipe.yml
    """
    from lmprune.cli.together import together
    from lmprune.cuts.plan import parse_numbers
    from lmprune.cuts.recipe import SUFFIXES
    from lmprune.files import check_output_file
    from lmprune.quiet import quiet_bars

    _check_one_of(
        {"--drop": drop, "--fraction": fraction, "--layers": layers, "--rebase": rebase or None}
        | {"--from-yaml": from_yaml, "--max-loss": how.max_loss, "--max-increase": how.max_increase}
        | {"--params": budget.params, "--size": budget.size, "--speed": budget.speed}
    )
    if (source is None) == (from_yaml is None):
        raise UsageError("give a MODEL, a PROFILE.json or --from-yaml OLD.yml" + ", and only one" * bool(source))
    source, again = source or str(from_yaml), rebase or from_yaml is not None
    _check_words(source, budget, how, criterion, runtime, again=again, layers=layers, measures=check or compensate)
    protected = parse_numbers(protect, "--protect")
    check_output_file(output, SUFFIXES)
    quiet_bars()
    if again:
        return _rewrite(source, output)
    cut, measured = _subject(source, trust_remote_code, allow_pickle)
    if budget.asked:
        return _by_budget(cut, output, budget, how, settings, data, protected)
    with together(settings.device) as speaks:
        _new(
            cut, measured, source, output, how, settings, data, criterion, drop, fraction, layers, protected, runtime,
            check=check, compensate=compensate, speaks=speaks,
        )  # fmt: skip


def _check_words(
    source: str,
    budget: BudgetSettings,
    how: ChoiceSettings,
    criterion: str,
    runtime: str | None,
    *,
    again: bool,
    layers: str | None,
    measures: bool,
) -> None:
    """Refuse words that nobody knows, and options that say nothing in this call; ``measures``: what the cut costs.

    Raises:
        UsageError: naming one.
    """
    from lmprune.criteria import CRITERIA
    from lmprune.cuts.plan import parse_layers
    from lmprune.forward.objectives import parse_objective
    from lmprune.models.runtimes import known_runtime

    CRITERIA.find(criterion)
    if how.objective is not None:
        parse_objective(how.objective)
    if runtime is not None:
        known_runtime(runtime)
    if again:
        refuse(_ALL, "the layers are those of the recipe")
    elif layers is not None:
        refuse(_CHOOSING | (_PROFILING if measures else _MEASURING), "--layers says which layers go")
    elif budget.asked:
        refuse(
            {"criterion", "runtime", "compensate", "check"} | _PROFILING,
            "a budget is searched for by what a cut costs",
        )
    else:
        # Of cuts that a runtime runs rightly, the one of the lowest loss is taken.
        _refuse_unread(criterion, how, measures or runtime is not None, known=source.endswith(".json"))
    if not budget.asked:
        refuse(_BUDGET, "there is no budget: give --params, --size or --speed with it")
    if layers is not None:
        parse_layers(layers)
    _ = budget.named  # refuses kinds that nobody knows


def _new(
    cut: Cut,
    measured: Any,
    source: str,
    output: Path,
    how: ChoiceSettings,
    settings: ProfileSettings,
    data: DataSettings,
    criterion: str,
    drop: int | None,
    fraction: float | None,
    layers: str | None,
    protect: tuple[int, ...],
    runtime: str | None,
    *,
    check: bool,
    compensate: bool,
    speaks: bool,
) -> None:
    """Choose and, in the process that speaks, write and tell."""
    from lmprune.choosing import ModelEvidence, choose, write_recipe
    from lmprune.cuts.plan import count_asked

    count = count_asked(drop, fraction)(cut.layers) if drop is not None or fraction is not None else None
    evidence = ModelEvidence(
        cut, replace(settings, drop=count), data, known=measured, profile_file=output.with_suffix(".profile.json"),
        protect=protect, how=how, journal_file=output.with_suffix(".losses.partial"),
    )  # fmt: skip
    made = (
        _by_hand(cut, layers, runtime)
        if layers is not None
        else choose(cut, criterion, drop=drop, fraction=fraction, runtime=runtime, evidence=evidence)
    )
    passes = round(evidence.passes, 2)  # before the cut is checked
    if compensate:
        from lmprune.choosing.compensating import compensated

        made = compensated(made, evidence)
    lines = [made.plan.describe(), made.reason]
    if check:
        made, cost = _checked(made, evidence)
        lines += cost
    elif runtime is None and evidence.read_nothing and not (evidence.has_profile and measured is None):
        why = f"{source} is measured already" if measured else f"--criterion {criterion} reads no text"
        refuse(_MEASURING - {"seed"} - (_LOADING if evidence.loaded else set()), why)
    if not speaks:
        return
    written = write_recipe(cut, made, output)
    evidence.close(done=True)
    _remark_on_mergekit(written)
    plan = written.recipe.plan
    result = {"out": output, "dropped": list(plan.dropped), "kept": list(plan.kept), "choice": made.to_data()}
    show.result("\n".join([*lines, str(output)]), result | {"passes": passes})


def _by_budget(
    cut: Cut,
    output: Path,
    budget: BudgetSettings,
    how: ChoiceSettings,
    settings: ProfileSettings,
    data: DataSettings,
    protect: tuple[int, ...],
) -> None:
    """Search under a budget, and write the recipe and the picture of the frontier."""
    from lmprune.budgeting.run import choose_by_budget, draw_frontier
    from lmprune.choosing import ModelEvidence, write_recipe

    evidence = ModelEvidence(
        cut, settings, data, protect=protect, how=how,
        journal_file=output.with_suffix(".losses.partial"),
    ).in_float32(at_speed=budget.speed is not None)  # fmt: skip
    found = choose_by_budget(budget, evidence)
    for note in found.notes:
        show.remark(note)
    written = write_recipe(cut, found.choice, output)
    picture = output.with_suffix(".frontier.png")
    draw_frontier(found, picture)
    evidence.close(done=True)
    _remark_on_mergekit(written)
    heading = ["model", "parameters", "MB", "as cut", "refitted", "speed"]
    rows = [
        (
            p.shape,
            f"{p.parameters:.1%}",
            f"{p.megabytes:,.1f}",
            f"{p.cut:+.4f}",
            f"{p.repaired:+.4f}",
            *([] if p.speed is None else [f"{p.speed:.2f}x"]),
        )
        for p in found.frontier
    ]
    heading = heading[: len(rows[0])]
    gave = [f"{kind} saves {saved:.1%} and costs {cost:.4f}" for kind, (saved, cost) in found.gave.items()]
    lines = [
        found.choice.plan.describe(), found.choice.reason, *gave, "", show.table(heading, rows, numbers=True), "",
        f"refit it with: lmprune heal {output} OUT --method refit", str(output), str(picture),
    ]  # fmt: skip
    plan = written.recipe.plan
    result = {"out": output, "dropped": list(plan.dropped), "kept": list(plan.kept), "choice": found.choice.to_data()}
    show.result("\n".join(lines), result | {"picture": picture})


def _rewrite(source: str, output: Path) -> None:
    """The recipe ``source`` as it should be here."""
    from lmprune.choosing import rebase

    written = rebase(source, output)
    _remark_on_mergekit(written)
    plan = written.recipe.plan
    result = {"out": output, "dropped": list(plan.dropped), "kept": list(plan.kept), "choice": None}
    show.result(f"{plan.describe()}\n{output}", result)


def _by_hand(cut: Cut, layers: str, runtime: str | None) -> Choice:
    """The plan that drops the layers that were typed."""
    from lmprune.criteria.evidence import Choice
    from lmprune.cuts.plan import Plan, parse_layers
    from lmprune.models.fitting import fits, require_loading

    plan = Plan(cut.layers, parse_layers(layers))
    if runtime is not None and not fits(cut.config, plan, runtime):
        require_loading(cut.config, runtime)
        raise UsageError(
            f"--layers {layers}: {runtime} would run another model. Give --drop {len(plan.dropped)} and let others be "
            "chosen"
        )
    return Choice(plan, "chosen by hand")


def _checked(made: Choice, evidence: ModelEvidence) -> tuple[Choice, list[str]]:
    """The choice with what it costs, and lines that say it; where that cannot be measured, a remark says why."""
    from lmprune.choosing import check

    _ = evidence.cut.checkpoint  # without weights there is no recipe either
    try:
        cost = check(made.plan, evidence, alternative=made.criterion == "angular")
    except LmpruneError as exc:
        show.remark(f"what the cut costs is not measured: {exc}")
        return made, []
    lines = [cost.describe()]
    if cost.better is not None:
        name, loss = cost.better
        lines.append(f"much worse than need be: {name}, for {loss:.4f}. Try --criterion one-shot, greedy or best")
    return replace(made, details={**made.details, "check": cost.to_data()}), lines


def _check_one_of(options: Mapping[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        *names, last = options
        raise UsageError(f"give exactly one of {', '.join(names)} and {last}, not {' and '.join(given) or 'none'}")


_PROFILING = {"token", "until", "indifference"}
"""What a profile alone depends on."""
_LOADING = {"device", "device_map", "dtype", "quantization"}
_MEASURING = (names_of(ProfileSettings, DataSettings) | {"loss_samples"}) - {"drop"}
_CHOOSING = {"criterion", "protect", "objective", "exact", "states", "abreast"}
_BUDGET = names_of(BudgetSettings)
_ALL = _MEASURING | _CHOOSING | _BUDGET
_ALL |= {"after", "compensate", "runtime", "check", "trust_remote_code", "allow_pickle"}


def _refuse_unread(criterion: str, how: ChoiceSettings, check: bool, *, known: bool) -> None:
    """Refuse what a criterion of ours never reads, before any work; ``known`` where a profile is given."""
    from lmprune.criteria import OWN

    if criterion not in OWN:
        return
    chooser = OWN[criterion]
    reads_text = getattr(chooser, "READS_TEXT", True)
    measures = hasattr(chooser, "OBJECTIVE")
    judged = measures or how.max_loss is not None
    alone = _PROFILING if judged or check else {*_PROFILING, "stream"}
    if measures or not reads_text:
        refuse(alone, f"--criterion {criterion} reads no profile")
    elif known and not criterion.startswith("greedy"):  # those measure again what is left after each cut
        refuse(alone, "the profile is measured already")
    if not judged:
        refuse({"exact", "states", "abreast"}, f"--criterion {criterion} measures no loss")
    if getattr(chooser, "SUBLAYERS", False):
        refuse({"abreast"}, f"--criterion {criterion} cuts sublayers, and such cuts run one by one")
    if not judged and not check:
        refuse({"after", "loss_samples"}, f"--criterion {criterion} measures no loss")
    if not reads_text and not check and not judged:
        refuse(_MEASURING - _LOADING - {"seed"}, f"--criterion {criterion} reads no text")


def _subject(source: str, trust_remote_code: bool, allow_pickle: bool) -> tuple[Cut, Any]:
    """The model that ``source`` names, and the profile if ``source`` is one."""
    from lmprune.models.cut import open_cut
    from lmprune.profiling.distances import Profile

    measured = Profile.read(Path(source)) if source.endswith(".json") else None
    model, revision = (measured.model, measured.revision) if measured else (source, None)
    return open_cut(model, revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code), measured


def _remark_on_mergekit(written: WrittenRecipe) -> None:
    """Say what someone must know who hands the recipe to mergekit."""
    from lmprune.cuts.plan import is_stock

    if not all(map(is_stock, written.recipe.parts)):
        show.remark("no checkpoint can hold this cut: lmprune's own commands and `lm_eval --model lmprune` run it")
    elif not written.mergekit:
        show.remark("mergekit cannot write this model rightly: use `lmprune prune`")
    elif written.base_folder:
        show.remark(f"mergekit needs a repaired config for this architecture: {written.base_folder}")
