"""``lmprune recipe``."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmprune.cli import show
from lmprune.cli.options import AllowPickle, TrustRemoteCode, with_options
from lmprune.errors import UsageError
from lmprune.profiling.settings import ProfileSettings
from lmprune.text.sources import DataSettings

if TYPE_CHECKING:
    from lmprune.criteria import Choice
    from lmprune.models.cut import Cut


@with_options(ProfileSettings, DataSettings)
def recipe(
    source: Annotated[str, typer.Argument(metavar="MODEL|PROFILE.json", help="A model, or a profile made from it.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The recipe to write.")],
    settings: ProfileSettings,
    data: DataSettings,
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
    criterion: Annotated[
        str, typer.Option(help="How layers are chosen; see docs/choosing.md for what each does.")
    ] = "angular",
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Choose the layers to drop and write them as a mergekit recipe.

    Given a MODEL, the angular criterion profiles it first and keeps the profile beside the recipe.
    """
    from lmprune.choosing import ModelEvidence, choose, write_recipe
    from lmprune.choosing import rebase as write_rebased
    from lmprune.criteria import CRITERIA
    from lmprune.cuts.plan import Plan, count_asked, parse_layers, parse_numbers
    from lmprune.files import check_output_file
    from lmprune.models.cut import open_cut
    from lmprune.quiet import quiet_bars

    _check_one_of(drop, fraction, layers, rebase or None)
    chosen = {"--criterion": criterion != "angular", "--protect": protect is not None} | _told(settings, data)
    if layers is not None or rebase:
        _refuse(chosen, "--rebase chooses no layers" if rebase else "--layers says which layers go")
    CRITERIA.find(criterion)
    check_output_file(output)
    quiet_bars()
    if rebase:
        written = write_rebased(source, output)
        _remark_on_mergekit(open_cut(source).base.path, written.base_folder)
        return show.result(f"{written.recipe.plan.describe()}\n{output}", {"recipe": str(output)}, json)
    cut, measured = _subject(source, trust_remote_code, allow_pickle)
    made: Choice | Plan
    if layers is not None:
        made, why = Plan(cut.layers, parse_layers(layers)), {}
    else:
        evidence = ModelEvidence(
            cut,
            replace(settings, drop=count_asked(drop, fraction)(cut.layers)),
            data,
            known=measured,
            profile_file=output.with_suffix(".profile.json"),
            protect=parse_numbers(protect, "--protect"),
        )
        made = choose(cut, criterion, drop=drop, fraction=fraction, evidence=evidence)
        if evidence.read_nothing and not (evidence.has_profile and measured is None):
            why_not = f"{source} is measured already" if measured else f"--criterion {criterion} reads no text"
            _refuse(_told(replace(settings, seed=0), data), why_not)
        why = made.to_data()
    written = write_recipe(cut, made, output)
    _remark_on_mergekit(cut.base.path, written.base_folder)
    plan = written.recipe.plan
    text = [plan.describe(), *([why["summary"]] if why else []), str(output)]
    result = {"recipe": str(output), "dropped": list(plan.dropped), "kept": list(plan.kept), "choice": why}
    show.result("\n".join(text), result, json)


def _check_one_of(drop: int | None, fraction: float | None, layers: str | None, rebase: bool | None) -> None:
    options = (("--drop", drop), ("--fraction", fraction), ("--layers", layers), ("--rebase", rebase))
    given = [name for name, value in options if value is not None]
    if len(given) != 1:
        raise UsageError(
            f"give exactly one of --drop, --fraction, --layers and --rebase, not {' and '.join(given) or 'none'}"
        )


def _told(settings: ProfileSettings, data: DataSettings) -> dict[str, bool]:
    """Option -> whether it says something else than it does by itself."""
    return {
        field.metadata.get("flag", f"--{field.name.replace('_', '-')}"): getattr(bundle, field.name) != field.default
        for bundle in (settings, data)
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


def _remark_on_mergekit(base: Path, base_folder: Path | None) -> None:
    """Say what someone must know who hands the recipe to mergekit."""
    from lmprune.models.checkpoint import read_config
    from lmprune.writing.support import best_writer

    if best_writer(read_config(base))[0] == "copy":
        show.remark("mergekit cannot write this model rightly: use `lmprune prune`")
    elif base_folder:
        show.remark(f"mergekit needs a repaired config for this architecture: {base_folder}")
