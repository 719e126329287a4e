"""``lmprune plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmprune.cli import show


def plot(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE.json", help="What lmprune profile wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture: .png, .svg or .pdf.", metavar="FILE")],
    drop: Annotated[
        list[int] | None,
        typer.Option(help="Number of layers to drop: its best block is marked. May be repeated.", metavar="N"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Draw a profile: the maps of all blocks, distance by start, and what each layer does."""
    from lmprune.drawing.maps import draw
    from lmprune.files import check_output_file
    from lmprune.profiling.distances import Profile

    check_output_file(output)
    draw(Profile.read(profile), output, sizes=drop or None)
    show.result(str(output), {"picture": str(output)}, json)
