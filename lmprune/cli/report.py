"""``lmprune report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmprune.cli import show


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN/", help="A folder that lmprune sweep wrote.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The page; beside it report.md and its pictures.", metavar="REPORT.html"),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 where numbers must not be mixed.")
    ] = False,
    knowledge_holds: Annotated[
        float, typer.Option(help="Reasoning gate: share of knowledge from which it holds.", metavar="F")
    ] = 0.9,
    reasoning_falls: Annotated[
        float, typer.Option(help="Reasoning gate: share of reasoning below which it has fallen.", metavar="F")
    ] = 0.8,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make one page of a sweep: what was cut and why, quality, speed, the recipe and samples.

    Results of different harness versions, data, limits or seeds are never drawn into one curve.
    """
    from lmprune.errors import RecipeError, UsageError
    from lmprune.evaluation.gate import Gate
    from lmprune.files import check_output_file
    from lmprune.reporting.collect import Collected

    if not check and output is None:
        raise UsageError("give -o REPORT.html, or --check")
    if output is not None:
        if output.suffix.lower() not in (".html", ".htm"):
            raise UsageError(f"-o {output}: a report is a page; end its name in .html")
        check_output_file(output)
    found = Collected.read(run, Gate(knowledge_holds, reasoning_falls))
    if found.problems:
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        raise RecipeError(
            f"{run}: these results do not belong in one curve: {found.problems[0]}{more}. "
            "Measure those points again in a new folder"
        )
    if check or output is None:
        text = f"{len(found.results)} of {len(found.sweep.points)} points, all measured alike"
        return show.result(text, {"points": len(found.results), "problems": []}, json)
    from lmprune.reporting.page import write_report

    written = write_report(found, output)
    lines = [*found.warnings(), *(str(path) for path in written)]
    show.result("\n".join(lines), {"files": [str(path) for path in written], "warnings": found.warnings()}, json)
