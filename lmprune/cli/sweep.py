"""``lmprune sweep``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lmprune.cli import show
from lmprune.cli.options import MODEL, with_options
from lmprune.evaluation.gate import Gate
from lmprune.sweeping.points import BASELINE
from lmprune.sweeping.settings import SweepSettings
from lmprune.text.sources import DataSettings


@with_options(SweepSettings, DataSettings, Gate)
def sweep(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    settings: SweepSettings,
    data: DataSettings,
    gate: Gate,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The run folder. Default: MODEL-sweep.", metavar="RUN/")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure many cuts of one model: the curve to look at before choosing how much to cut.

    The same command goes on where it stopped, point by point.
    """
    from lmprune.models.cut import open_cut, safe_name
    from lmprune.quiet import quiet_bars

    out = output or Path(f"{safe_name(open_cut(model).name)}-sweep")
    quiet_bars()
    from lmprune.reporting.collect import Collected
    from lmprune.reporting.words import agreement_text, gate_text, summary, table, types_table
    from lmprune.sweeping.run import sweep as measure

    done = measure(model, out, settings, data)
    if done.commands:
        return show.result("\n".join(done.commands), {"commands": list(done.commands)}, json)
    if BASELINE not in done.measured:  # a process of a launcher that has other points
        return show.result(str(out), {"run": str(out)}, json)
    found = Collected.read(out, gate)
    lines = [show.table(*table(found)), ""]
    if found.typed():
        lines += [show.table(*types_table(found)), ""]
    lines += [*([said] if (said := agreement_text(found)) else []), *summary(found), gate_text(found), ""]
    if done.left:
        lines += [f"left: {', '.join(done.left)}. Run the same command to go on", ""]
    lines.append(f"{out}\nlook at it: lmprune report {out} -o report.html")
    result = {
        "run": str(out),
        "left": list(done.left),
        "passes": dict(done.sweep.passes),
        "scores": {name: {task: score.value for task, score in r.scores.items()} for name, r in found.results.items()},
        "agreement": asdict(found.agreements) if found.agreements is not None else None,
        "warnings": found.warnings(),
    }
    show.result("\n".join(lines), result, json)
