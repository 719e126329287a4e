"""``lmprune recipe``."""

from __future__ import annotations

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
    from lmprune.cuts.plan import Plan
    from lmprune.models.cut import Cut


@with_options(ProfileSettings, DataSettings)
def recipe(
    output: Annotated[Path, typer.Option("-o", "--output", help="The recipe to write.")],
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
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Choose the layers to drop and write them as a mergekit recipe.

    Given a MODEL, the angular criterion profiles it first and keeps the profile beside the recipe.
    """
    from lmprune.choosing import choose, write_recipe
    from lmprune.choosing import rebase as write_rebased
    from lmprune.criteria import CRITERIA
    from lmprune.cuts.plan import parse_numbers
    from lmprune.files import check_output_file
    from lmprune.models.cut import open_cut
    from lmprune.models.runtimes import known_runtime
    from lmprune.quiet import quiet_bars

    _check_one_of(drop, fraction, layers, rebase or None, from_yaml)
    if (source is None) == (from_yaml is None):
        raise UsageError("give a MODEL, a PROFILE.json or --from-yaml OLD.yml" + ", and only one" * bool(source))
    source = source or str(from_yaml)
    CRITERIA.find(criterion)
    if runtime is not None:
        known_runtime(runtime)
    check_output_file(output)
    quiet_bars()
    if rebase or from_yaml is not None:
        written = write_rebased(source, output)
        _remark_on_mergekit(open_cut(source).base.path, written.base_folder)
        return show.result(f"{written.recipe.plan.describe()}\n{output}", {"recipe": str(output)}, json)
    cut, measured = _subject(source, trust_remote_code, allow_pickle)
    made: Choice | Plan
    if layers is not None:
        made, why = _by_hand(cut, layers, runtime), {}
    else:
        beside = output.with_suffix(".profile.json")
        made = choose(
            cut, criterion, drop=drop, fraction=fraction, settings=settings, data=data, profile=measured,
            profile_file=beside, protect=parse_numbers(protect, "--protect"), runtime=runtime,
        )  # fmt: skip
        why = made.to_data()
    written = write_recipe(cut, made, output)
    _remark_on_mergekit(cut.base.path, written.base_folder)
    plan = written.recipe.plan
    text = [plan.describe(), *([why["summary"]] if why else []), str(output)]
    result = {"recipe": str(output), "dropped": list(plan.dropped), "kept": list(plan.kept), "choice": why}
    show.result("\n".join(text), result, json)


def _by_hand(cut: Cut, layers: str, runtime: str | None) -> Plan:
    """The plan that drops the layers that were typed."""
    from lmprune.cuts.plan import Plan, parse_layers
    from lmprune.models.fitting import fits

    plan = Plan(cut.layers, parse_layers(layers))
    if runtime is not None and not fits(cut.config, plan, runtime):
        raise UsageError(
            f"--layers {layers}: {runtime} would run another model. Give --drop {len(plan.dropped)} and let others be "
            "chosen"
        )
    return plan


def _check_one_of(
    drop: int | None, fraction: float | None, layers: str | None, rebase: bool | None, from_yaml: str | None
) -> None:
    options = (
        ("--drop", drop), ("--fraction", fraction), ("--layers", layers), ("--rebase", rebase),
        ("--from-yaml", from_yaml),
    )  # fmt: skip
    given = [name for name, value in options if value is not None]
    if len(given) != 1:
        raise UsageError(
            "give exactly one of --drop, --fraction, --layers, --rebase and --from-yaml, not "
            f" {' and '.join(given) or 'none'}"
        )


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
