"""``lmprune report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmprune.cli import show
from lmprune.cli.options import with_options
from lmprune.evaluation.gate import Gate


@with_options(Gate)
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN/", help="A folder that lmprune sweep wrote.")],
    gate: Gate,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The page; beside it report.md and its pictures.", metavar="REPORT.html"),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 where numbers must not be mixed.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make one page of a sweep: what was cut and why, quality, speed, the recipe and samples.

    Results of different harness versions, data, limits or seeds are never drawn into one curve.
    """
    from lmprune.errors import UsageError
    from lmprune.reporting.collect import Collected

    if check:
        found = Collected.read(run, gate).alike()
        text = f"{len(found.results)} of {len(found.sweep.points)} points, all measured alike"
        return show.result(text, {"points": len(found.results), "problems": []}, json)
    if output is None:
        raise UsageError("give -o REPORT.html, or --check")
    from lmprune.reporting.page import check_page, write_report

    check_page(output)
    found = Collected.read(run, gate).alike()
    written = write_report(found, output)
    lines = [*found.warnings(), *(str(path) for path in written)]
    show.result("\n".join(lines), {"files": [str(path) for path in written], "warnings": found.warnings()}, json)
