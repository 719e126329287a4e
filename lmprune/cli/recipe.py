"""``lmprune recipe``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmprune.cli import show
from lmprune.cli.options import AllowPickle, TrustRemoteCode, with_options
from lmprune.errors import RecipeError, UsageError
from lmprune.profiling.settings import ProfileSettings
from lmprune.text.sources import DataSettings

if TYPE_CHECKING:
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
    criterion: Annotated[str, typer.Option(help="How layers are chosen: angular or deepest.")] = "angular",
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Choose the layers to drop and write them as a mergekit recipe.

    Given a MODEL, the angular criterion profiles it first and keeps the profile beside the recipe.
    """
    from lmprune.choosing import explain, write_recipe
    from lmprune.criteria import criterion as find
    from lmprune.cuts.plan import Plan, check_count, count_of_fraction, parse_layers
    from lmprune.files import check_output_file
    from lmprune.quiet import quiet_bars

    _check_one_of(drop, fraction, layers)
    chooser = find(criterion)
    check_output_file(output)
    quiet_bars()
    cut, measured = _subject(source, trust_remote_code, allow_pickle)
    total = cut.layers
    if measured and measured.layers != total:
        raise RecipeError(f"{source} is a profile of {measured.layers} layers, but {cut.name} has {total}")
    choice: dict[str, Any] = {}
    if layers is not None:
        plan = Plan(total, parse_layers(layers))
    else:
        count = check_count(drop, total) if drop is not None else count_of_fraction(fraction or 0.0, total)
        if chooser.needs_profile and measured is None:
            if trust_remote_code:
                raise UsageError("profiling does not run a model's own code. Give --layers or --criterion deepest")
            measured = _profile_beside(output, cut, replace(settings, drop=count), data)
        plan = chooser.choose(total, count, measured)
        if chooser.needs_profile and measured is not None:
            choice = explain(measured, plan)
    by = criterion if layers is None else None
    written = write_recipe(cut, plan, output, criterion=by, choice=choice)
    _remark_on_mergekit(cut.base.path, written.base_folder)
    text = [written.recipe.plan.describe(), *([choice["summary"]] if choice else []), str(output)]
    result = {"recipe": str(output), "dropped": list(plan.dropped), "kept": list(plan.kept), "choice": choice}
    show.result("\n".join(text), result, json)


def _check_one_of(drop: int | None, fraction: float | None, layers: str | None) -> None:
    options = (("--drop", drop), ("--fraction", fraction), ("--layers", layers))
    given = [name for name, value in options if value is not None]
    if len(given) != 1:
        raise UsageError(f"give exactly one of --drop, --fraction and --layers, not {' and '.join(given) or 'none'}")


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


def _profile_beside(output: Path, model: Cut, settings: ProfileSettings, data: DataSettings) -> Any:
    """The model's profile, kept as ``RECIPE.profile.json`` and used again when the same is asked for."""
    from lmprune.profiling import profile_model

    return profile_model(model, output.with_suffix(".profile.json"), settings, data, reuse=True)
