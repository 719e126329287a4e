"""``lmprune compare`` and ``lmprune layers``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmprune.cli import show
from lmprune.cli.options import (
    NOT_JOINED,
    NOT_WALKED,
    Drop,
    Fraction,
    IncludePath,
    Limit,
    Model,
    Protect,
    Tasks,
    Useless,
    with_options,
    without,
)
from lmprune.cli.together import together
from lmprune.criteria.settings import ChoiceSettings
from lmprune.profiling.settings import ProfileSettings
from lmprune.settings import words_of
from lmprune.text.sources import DataSettings

Picture = Annotated[
    Path | None, typer.Option("-o", "--output", help="Also draw it: .png, .svg or .pdf.", metavar="FILE")
]
_NO_TASKS = Useless(("limit", "include_path"), without("tasks"), "no --tasks are evaluated")


@with_options(
    ChoiceSettings,
    ProfileSettings,
    DataSettings,
    useless=(_NO_TASKS, NOT_JOINED, NOT_WALKED),
    leave_out=("resume", "max_loss", "max_increase"),
)
def compare(
    model: Model,
    how: ChoiceSettings,
    settings: ProfileSettings,
    data: DataSettings,
    drop: Drop = None,
    fraction: Fraction = None,
    criteria: Annotated[str | None, typer.Option(help="Which criteria. Default: all.", metavar="C,...")] = None,
    protect: Protect = None,
    tasks: Tasks = None,
    limit: Limit = None,
    include_path: IncludePath = None,
    output: Picture = None,
) -> None:
    """Let the criteria choose on the same tokens, and judge all choices on text that none of them saw.

    Examples:
        lmprune compare demo --drop 3
        lmprune compare demo --fraction 0.25 --criteria angular,greedy,best --samples 64 -o choices.png
    """
    from lmprune.comparing import compare as run
    from lmprune.comparing import gone
    from lmprune.criteria import CRITERIA
    from lmprune.cuts.plan import count_asked, parse_numbers
    from lmprune.forward.objectives import parse_objective
    from lmprune.quiet import quiet_bars

    names = None if criteria is None else words_of("--criteria", criteria)
    for name in names or ():
        CRITERIA.find(name)
    if how.objective is not None:
        parse_objective(how.objective)
    count_asked(drop, fraction)
    judged = words_of("--tasks", tasks)
    protected = parse_numbers(protect, "--protect")
    _check(output)
    quiet_bars()
    with together(settings.device) as speaks:
        done = run(
            model, drop=drop, fraction=fraction, criteria=names, settings=settings, data=data,
            protect=protected, how=how, tasks=judged, limit=limit, include_path=include_path,
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
        note += "; " + ", ".join(f"{task} {score.value:.3f}" for task, score in done.scores.items())
    show.result("\n".join([show.table(head, rows), "", note]), done.to_data())


@with_options(ProfileSettings, DataSettings, useless=(_NO_TASKS, NOT_JOINED), leave_out=("resume",))
def layers(
    model: Model,
    settings: ProfileSettings,
    data: DataSettings,
    objectives: Annotated[
        str, typer.Option(help="By which objectives: loss, kl, self, answers, task:NAME, or mixes.", metavar="O,...")
    ] = "loss",
    tasks: Tasks = None,
    limit: Limit = None,
    include_path: IncludePath = None,
    output: Picture = None,
) -> None:
    """Show what every single layer is worth: how much is lost without it, and what it changes.

    Examples:
        lmprune layers demo --samples 64
        lmprune layers demo --objectives loss,self --tasks lmprune_demo_facts --limit 32 -o layers.png
    """
    from lmprune.comparing import layer_costs
    from lmprune.forward.objectives import parse_objective
    from lmprune.quiet import quiet_bars

    asked, judged = words_of("--objectives", objectives), words_of("--tasks", tasks)
    for name in asked:
        parse_objective(name)
    _check(output)
    quiet_bars()
    with together(settings.device) as speaks:
        done = layer_costs(
            model, settings, data, objectives=asked, tasks=judged, limit=limit,
            include_path=include_path,
        )  # fmt: skip
    if not speaks:
        return
    if output is not None:
        from lmprune.drawing.bars import draw_layers

        drawn = {name: ("rises by (nats a token)", rise) for name, rise in done.rises.items()}
        drawn |= {
            task: (f"score (whole: {done.whole[task].value:.3f})", {at: score.value for at, score in found.items()})
            for task, found in done.scores.items()
        }
        draw_layers(output, drawn, f"{done.model}: what every single layer is worth")
    head, rows = done.table()
    took = f"took {done.seconds:.1f} s: a profile, and losses of {done.passes:.1f} passes over the text"
    show.result("\n".join([show.table(head, rows), "", took]), done.to_data())


def _check(output: Path | None) -> None:
    if output is not None:
        from lmprune.drawing.bars import check_picture
        from lmprune.files import check_output_file

        check_picture(output)
        check_output_file(output)
