"""``lmprune plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmprune.cli import show


def plot(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE.json", help="What lmprune profile wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture: .png, .svg or .pdf.", metavar="FILE")],
    n: Annotated[
        list[int] | None,
        typer.Option("-n", "--size", help="Block size to draw and mark; may be repeated.", metavar="N"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Draw a profile: the maps of all blocks, distance by start, and what each layer does."""
    from lmprune.drawing.maps import draw
    from lmprune.files import check_output_file
    from lmprune.profiling.distances import Profile

    check_output_file(output)
    draw(Profile.read(profile), output, sizes=n or None)
    show.result(str(output), {"picture": str(output)}, json)
