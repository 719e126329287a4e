"""``lmprune recipe``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmprune.budgeting.budget import BudgetSettings
from lmprune.cli import show
from lmprune.cli.options import AllowPickle, TrustRemoteCode, with_options
from lmprune.criteria.settings import ChoiceSettings
from lmprune.errors import LmpruneError, UsageError
from lmprune.profiling.settings import ProfileSettings
from lmprune.text.sources import DataSettings

if TYPE_CHECKING:
    from lmprune.choosing import ModelEvidence, WrittenRecipe
    from lmprune.criteria import Choice
    from lmprune.models.cut import Cut


@with_options(BudgetSettings, ChoiceSettings, ProfileSettings, DataSettings)
def recipe(
    output: Annotated[Path, typer.Option("-o", "--output", help="The recipe to write.")],
    budget: BudgetSettings,
    how: ChoiceSettings,
    settings: ProfileSettings,
    data: DataSettings,
    source: Annotated[
        str | None, typer.Argument(metavar="MODEL|PROFILE.json", help="A model, or a profile made from it.")
    ] = None,
    drop: Annotated[int | None, typer.Option(help="Number of layers to drop.", metavar="N")] = None,
    fraction: Annotated[float | None, typer.Option(help="Share of the layers to drop.", metavar="F")] = None,
    layers: Annotated[
        str | None, typer.Option(help="The layers to drop, both ends included: 3-5,9 drops 3, 4, 5 and 9.")
    ] = None,
    protect: Annotated[
        str | None, typer.Option(help="Layers that must stay, such as 0,1,-1; -1 is the last.", metavar="L,...")
    ] = None,
    rebase: Annotated[
        bool, typer.Option("--rebase", help="Write a recipe from another machine so that plain mergekit runs it here.")
    ] = False,
    from_yaml: Annotated[
        str | None,
        typer.Option(help="Add what is missing to a mergekit file that somebody wrote by hand.", metavar="OLD.yml"),
    ] = None,
    criterion: Annotated[
        str, typer.Option(help="How layers are chosen; see docs/choosing.md for what each does.")
    ] = "angular",
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
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Choose the layers to drop and write them as a mergekit recipe.

    Given a MODEL, the angular criterion profiles it first and keeps the profile beside the recipe. Given a budget
    (--params, --size or --speed), layers, neurons and hidden size are searched for what costs least.
    """
    from lmprune.cli.together import together
    from lmprune.criteria import CRITERIA
    from lmprune.files import check_output_file
    from lmprune.models.runtimes import known_runtime
    from lmprune.quiet import quiet_bars

    _check_one_of(
        {"--drop": drop, "--fraction": fraction, "--layers": layers, "--rebase": rebase or None}
        | {"--from-yaml": from_yaml, "--max-loss": how.max_loss, "--max-increase": how.max_increase}
        | {"--params": budget.params, "--size": budget.size, "--speed": budget.speed}
    )
    if (source is None) == (from_yaml is None):
        raise UsageError("give a MODEL, a PROFILE.json or --from-yaml OLD.yml" + ", and only one" * bool(source))
    if budget.asked:
        _refuse(
            {
                "--criterion": criterion not in ("angular", "best"),
                "--runtime": runtime is not None,
                "--compensate": compensate,
            },
            "a budget is searched for by what a cut costs",
        )
    else:
        _refuse(_told(budget), "there is no budget: give --params, --size or --speed with it")
    source, again = source or str(from_yaml), rebase or from_yaml is not None
    if layers is not None or again:
        told = {"--criterion": criterion != "angular", "--protect": protect is not None}
        told |= _told(settings, data) if again or not (check or compensate) else {}
        told |= {"--compensate": compensate and again}
        _refuse(told, "the layers are those of the recipe" if again else "--layers says which layers go")
    CRITERIA.find(criterion)
    if runtime is not None:
        known_runtime(runtime)
    check_output_file(output)
    quiet_bars()
    if again:
        return _rewrite(source, output, json)
    cut, measured = _subject(source, trust_remote_code, allow_pickle)
    if budget.asked:
        return _by_budget(cut, output, budget, how, settings, data, protect, json)
    with together(settings.device) as speaks:
        _new(
            cut, measured, source, output, how, settings, data, criterion, drop, fraction, layers, protect, runtime,
            check=check, compensate=compensate, json=json, speaks=speaks,
        )  # fmt: skip


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
    protect: str | None,
    runtime: str | None,
    *,
    check: bool,
    compensate: bool,
    json: bool,
    speaks: bool,
) -> None:
    """Choose and, in the process that speaks, write and tell."""
    from lmprune.choosing import ModelEvidence, choose, write_recipe
    from lmprune.cuts.plan import count_asked, parse_numbers

    count = count_asked(drop, fraction)(cut.layers) if drop is not None or fraction is not None else None
    evidence = ModelEvidence(
        cut, replace(settings, drop=count), data, known=measured, profile_file=output.with_suffix(".profile.json"),
        protect=parse_numbers(protect, "--protect"), how=how, journal_file=output.with_suffix(".losses.partial"),
    )  # fmt: skip
    made = (
        _by_hand(cut, layers, runtime)
        if layers is not None
        else choose(cut, criterion, drop=drop, fraction=fraction, runtime=runtime, evidence=evidence)
    )
    if compensate:
        from lmprune.choosing.compensating import compensated

        made = compensated(made, evidence)
    lines = [made.plan.describe(), made.reason]
    if check:
        made, cost = _checked(made, evidence)
        lines += cost
    elif evidence.read_nothing and not (evidence.has_profile and measured is None):
        why = f"{source} is measured already" if measured else f"--criterion {criterion} reads no text"
        _refuse(_told(replace(settings, seed=0), data), why)
    if not speaks:
        return
    written = write_recipe(cut, made, output)
    evidence.close(done=True)
    _remark_on_mergekit(written)
    plan = written.recipe.plan
    result = {"recipe": str(output), "dropped": list(plan.dropped), "kept": list(plan.kept), "choice": made.to_data()}
    show.result("\n".join([*lines, str(output)]), result, json)


def _by_budget(
    cut: Cut,
    output: Path,
    budget: BudgetSettings,
    how: ChoiceSettings,
    settings: ProfileSettings,
    data: DataSettings,
    protect: str | None,
    json: bool,
) -> None:
    """Search under a budget, and write the recipe and the picture of the frontier."""
    from lmprune.budgeting.run import choose_by_budget, draw_frontier
    from lmprune.choosing import ModelEvidence, write_recipe
    from lmprune.cuts.plan import parse_numbers

    evidence = ModelEvidence(
        cut, settings, data, protect=parse_numbers(protect, "--protect"), how=how,
        journal_file=output.with_suffix(".losses.partial"),
    ).in_float32()  # fmt: skip
    found = choose_by_budget(budget, evidence)
    for note in found.notes:
        show.remark(note)
    written = write_recipe(cut, found.choice, output)
    picture = output.with_suffix(".frontier.png")
    draw_frontier(found, picture)
    evidence.close(done=True)
    _remark_on_mergekit(written)
    heading = ("model", "parameters", "MB", "as cut", "refitted", "speed")
    rows = [
        (
            p.shape,
            f"{p.parameters:.1%}",
            f"{p.megabytes:,.1f}",
            f"{p.cut:+.4f}",
            f"{p.repaired:+.4f}",
            f"{p.speed:.2f}x",
        )
        for p in found.frontier
    ]
    gave = [f"{kind} saves {saved:.1%} and costs {cost:.4f}" for kind, (saved, cost) in found.gave.items()]
    lines = [
        found.choice.plan.describe(), found.choice.reason, *gave, "", show.table(heading, rows, numbers=True), "",
        f"refit it with: lmprune heal {output} OUT --method refit", str(output), str(picture),
    ]  # fmt: skip
    result = {"recipe": str(output), "picture": str(picture), "choice": found.choice.to_data()}
    show.result("\n".join(lines), result, json)


def _rewrite(source: str, output: Path, json: bool) -> None:
    """The recipe ``source`` as it should be here."""
    from lmprune.choosing import rebase

    written = rebase(source, output)
    _remark_on_mergekit(written)
    show.result(f"{written.recipe.plan.describe()}\n{output}", {"recipe": str(output)}, json)


def _by_hand(cut: Cut, layers: str, runtime: str | None) -> Choice:
    """The plan that drops the layers that were typed."""
    from lmprune.criteria.evidence import Choice
    from lmprune.cuts.plan import Plan, parse_layers
    from lmprune.models.fitting import fits

    plan = Plan(cut.layers, parse_layers(layers))
    if runtime is not None and not fits(cut.config, plan, runtime):
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


def _told(*bundles: BudgetSettings | ProfileSettings | DataSettings) -> dict[str, bool]:
    """Option -> whether it says something else than it does by itself."""
    return {
        field.metadata.get("flag", f"--{field.name.replace('_', '-')}"): getattr(bundle, field.name) != field.default
        for bundle in bundles
        for field in fields(bundle)
        if field.name != "drop"
    }


def _refuse(told: dict[str, bool], why: str) -> None:
    """Refuse an option that has no effect here."""
    if (option := next((name for name, given in told.items() if given), None)) is not None:
        raise UsageError(f"{option} has no effect: {why}. Leave it out")


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
