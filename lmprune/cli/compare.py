"""``lmprune compare`` and ``lmprune layers``."""

from __future__ import annotations

from typing import Annotated

import typer

from lmprune.cli import show
from lmprune.cli.options import with_options
from lmprune.profiling.settings import ProfileSettings
from lmprune.text.sources import DataSettings


@with_options(ProfileSettings, DataSettings)
def compare(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A recipe, a checkpoint, a Hub id, or the word demo.")],
    settings: ProfileSettings,
    data: DataSettings,
    drop: Annotated[int | None, typer.Option(help="Number of layers to drop.", metavar="N")] = None,
    fraction: Annotated[float | None, typer.Option(help="Share of the layers to drop.", metavar="F")] = None,
    criteria: Annotated[str | None, typer.Option(help="Which criteria. Default: all.", metavar="C,...")] = None,
    protect: Annotated[
        str | None, typer.Option(help="Layers that must stay, such as 0,1,-1; -1 is the last.", metavar="L,...")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Let the criteria choose on the same tokens, and judge all choices on text that none of them saw."""
    from lmprune.comparing import compare as run
    from lmprune.criteria import CRITERIA
    from lmprune.cuts.plan import parse_numbers
    from lmprune.quiet import quiet_bars

    names = [name.strip() for name in criteria.split(",")] if criteria else None
    for name in names or ():
        CRITERIA.find(name)
    quiet_bars()
    done = run(
        model, drop=drop, fraction=fraction, criteria=names, settings=settings, data=data,
        protect=parse_numbers(protect, "--protect"),
    )  # fmt: skip
    head, rows = done.table()
    note = f"loss in nats a token on unseen text; the whole model: {done.whole:.4f}"
    show.result("\n".join([show.table(head, rows), "", note]), done.to_data(), json)


@with_options(ProfileSettings, DataSettings)
def layers(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A recipe, a checkpoint, a Hub id, or the word demo.")],
    settings: ProfileSettings,
    data: DataSettings,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show what every single layer is worth: how much the loss rises without it, and what it changes."""
    from lmprune.comparing import layer_costs
    from lmprune.quiet import quiet_bars

    quiet_bars()
    done = layer_costs(model, settings, data)
    head, rows = done.table()
    show.result(show.table(head, rows), done.to_data(), json)
