"""``lmprune demo``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmprune.cli import show
from lmprune.cli.options import Useless, given, with_options

if TYPE_CHECKING:
    from lmprune.demo.walk import Walk


@with_options(useless=(Useless(("drop",), given("where"), "--where prints a folder and stops"),))
def demo(
    folder: Annotated[Path | None, typer.Argument(help="Where to write; a temporary folder by default.")] = None,
    where: Annotated[bool, typer.Option("--where", help="Print the embedded model's folder and stop.")] = False,
    drop: Annotated[int, typer.Option(help="Layers to drop.", metavar="N")] = 3,
) -> None:
    """Walk the whole path on the embedded model and print what became of it.

    Examples:
        lmprune demo
        lmprune demo walk/ --drop 4
    """
    from lmprune.models.locate import demo_folder

    if where:
        return show.result(str(demo_folder()), {"out": demo_folder()})
    from lmprune.cuts.plan import check_count
    from lmprune.files import check_output_folder
    from lmprune.quiet import quiet_bars

    if folder is not None:
        check_output_folder(folder)
    check_count(drop, _demo_layers())
    quiet_bars()
    from lmprune.demo.walk import walk

    done = walk(folder or Path(tempfile.mkdtemp(prefix="lmprune-demo-")), drop=drop)
    show.result(_table(done), {"out": done.paths["recipe"].parent} | done.to_data())


def _demo_layers() -> int:
    from lmprune.models.checkpoint import read_config
    from lmprune.models.fields import layer_count
    from lmprune.models.locate import demo_folder

    return layer_count(read_config(demo_folder()))


def _table(done: Walk) -> str:
    # The spaces set names, counts and measurements apart.
    head = ("model", " layers", "parameters", "  loss", "facts", "arithmetic", "tokens/s")
    rows = [
        (
            row.model,
            str(row.layers),
            f"{row.parameters:,}",
            f"{row.bits_per_byte:.3f}",
            f"{row.facts:.1%}",
            f"{row.arithmetic:.1%}",
            f"{row.tokens_per_second:,.0f}",
        )
        for row in done.rows
    ]
    written = [f"{name:<10}{path}" for name, path in done.paths.items()]
    note = "loss in bits per byte on held-out text; facts and arithmetic are shares answered rightly"
    return "\n".join([show.table(head, rows, numbers=True), "", note, "", *written])
