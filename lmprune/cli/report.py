"""``lmprune report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmprune.cli import show
from lmprune.cli.options import Useless, given, names_of, readable, with_options
from lmprune.evaluation.gate import Gate


@with_options(
    Gate,
    useless=(Useless(("output", *names_of(Gate)), given("check"), "--check writes nothing and judges nothing"),),
)
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN/", help="A folder that lmprune sweep wrote."), readable],
    gate: Gate,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The page; beside it report.md and its pictures.", metavar="REPORT.html"),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 where numbers must not be mixed.")
    ] = False,
) -> None:
    """Make one page of a sweep: what was cut and why, quality, speed, the recipe and samples.

    Results of different harness versions, data, limits or seeds are never drawn into one curve.

    Examples:
        lmprune report sweep/ -o report.html
        lmprune report sweep/ --check
    """
    from lmprune.errors import UsageError
    from lmprune.reporting.collect import Collected

    if check:
        found = Collected.read(run, gate).alike()
        text = f"{len(found.results)} of {len(found.sweep.points)} points, all measured alike"
        return show.result(text, {"points": len(found.results), "problems": []})
    if output is None:
        raise UsageError("give -o REPORT.html, or --check")
    from lmprune.reporting.page import check_page, write_report

    check_page(output)
    found = Collected.read(run, gate).alike()
    written = write_report(found, output)
    lines = [*found.warnings(), *(str(path) for path in written)]
    show.result("\n".join(lines), {"out": output, "files": written, "warnings": found.warnings()})
