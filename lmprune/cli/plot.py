"""``lmprune plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmprune.cli import show
from lmprune.cli.options import readable, with_options


@with_options()
def plot(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE.json", help="What lmprune profile wrote."), readable],
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture: .png, .svg or .pdf.", metavar="FILE")],
    drop: Annotated[
        list[int] | None,
        typer.Option(help="Number of layers to drop: its best block is marked. May be repeated.", metavar="N"),
    ] = None,
) -> None:
    """Draw a profile: the maps of all blocks, distance by start, and what each layer does.

    Examples:
        lmprune plot profile.json -o map.png
        lmprune plot profile.json -o map.svg --drop 3 --drop 6
    """
    from lmprune.drawing.maps import draw
    from lmprune.files import check_output_file
    from lmprune.profiling.distances import Profile

    check_output_file(output)
    draw(Profile.read(profile), output, sizes=drop or None)
    show.result(str(output), {"out": output})
