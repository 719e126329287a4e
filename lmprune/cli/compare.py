"""``lmprune compare`` and ``lmprune layers``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmprune.cli import show
from lmprune.cli.options import MODEL, with_options
from lmprune.cli.together import together
from lmprune.criteria.settings import ChoiceSettings
from lmprune.profiling.settings import ProfileSettings
from lmprune.text.sources import DataSettings

Picture = Annotated[
    Path | None, typer.Option("-o", "--output", help="Also draw it: .png, .svg or .pdf.", metavar="FILE")
]
Tasks = Annotated[
    str | None, typer.Option(help="Tasks or groups of the harness that every cut is evaluated on.", metavar="T,...")
]
Limit = Annotated[int | None, typer.Option(help="Documents of each task, at most.", metavar="N")]


@with_options(ChoiceSettings, ProfileSettings, DataSettings)
def compare(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    how: ChoiceSettings,
    settings: ProfileSettings,
    data: DataSettings,
    drop: Annotated[int | None, typer.Option(help="Number of layers to drop.", metavar="N")] = None,
    fraction: Annotated[float | None, typer.Option(help="Share of the layers to drop.", metavar="F")] = None,
    criteria: Annotated[str | None, typer.Option(help="Which criteria. Default: all.", metavar="C,...")] = None,
    protect: Annotated[
        str | None, typer.Option(help="Layers that must stay, such as 0,1,-1; -1 is the last.", metavar="L,...")
    ] = None,
    tasks: Tasks = None,
    limit: Limit = None,
    output: Picture = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Let the criteria choose on the same tokens, and judge all choices on text that none of them saw."""
    from lmprune.comparing import compare as run
    from lmprune.comparing import gone
    from lmprune.criteria import CRITERIA
    from lmprune.cuts.plan import parse_numbers
    from lmprune.quiet import quiet_bars

    names = _words(criteria) or None
    for name in names or ():
        CRITERIA.find(name)
    _check(output)
    quiet_bars()
    with together(settings.device) as speaks:
        done = run(
            model, drop=drop, fraction=fraction, criteria=names, settings=settings, data=data,
            protect=parse_numbers(protect, "--protect"), how=how, tasks=_words(tasks), limit=limit,
        )  # fmt: skip
    if not speaks:
        return
    if output is not None:
        from lmprune.drawing.bars import draw_choices

        bars = [(row.criterion, gone(row.choice.plan), row.rise or 0.0) for row in done.rows if row.choice]
        chance = next((row.rise for row in done.rows if row.criterion == "random"), None)
        draw_choices(output, bars, chance, f"{done.model}: {done.count} layers less")
    head, rows = done.table()
    note = f"loss in nats a token on unseen text; the whole model: {done.whole:.4f}"
    if done.scores:
        note += "; " + ", ".join(f"{task} {value:.3f}" for task, value in done.scores.items())
    show.result("\n".join([show.table(head, rows), "", note]), done.to_data(), json)


@with_options(ProfileSettings, DataSettings)
def layers(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    settings: ProfileSettings,
    data: DataSettings,
    objectives: Annotated[
        str, typer.Option(help="By which objectives: loss, kl, self, answers, task:NAME, or mixes.", metavar="O,...")
    ] = "loss",
    tasks: Tasks = None,
    limit: Limit = None,
    output: Picture = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show what every single layer is worth: how much is lost without it, and what it changes."""
    from lmprune.comparing import layer_costs
    from lmprune.quiet import quiet_bars

    _check(output)
    quiet_bars()
    with together(settings.device) as speaks:
        done = layer_costs(model, settings, data, objectives=_words(objectives), tasks=_words(tasks), limit=limit)
    if not speaks:
        return
    if output is not None:
        from lmprune.drawing.bars import draw_layers

        drawn = {name: ("rises by (nats a token)", rise) for name, rise in done.rises.items()}
        drawn |= {task: (f"score (whole: {done.whole[task]:.3f})", found) for task, found in done.scores.items()}
        draw_layers(output, drawn, f"{done.model}: what every single layer is worth")
    head, rows = done.table()
    show.result(show.table(head, rows), done.to_data(), json)


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in text.split(",")] if text else []


def _check(output: Path | None) -> None:
    if output is not None:
        from lmprune.drawing.bars import check_picture
        from lmprune.files import check_output_file

        check_picture(output)
        check_output_file(output)
