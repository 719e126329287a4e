"""``lmprune sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmprune.cli import show
from lmprune.cli.options import MODEL, with_options
from lmprune.sweeping.settings import SweepSettings
from lmprune.text.sources import DataSettings

if TYPE_CHECKING:
    from lmprune.sweeping.folder import Sweep
    from lmprune.sweeping.run import SweepRun


@with_options(SweepSettings, DataSettings)
def sweep(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    settings: SweepSettings,
    data: DataSettings,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The run folder. Default: MODEL-sweep.", metavar="RUN/")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure many cuts of one model: the curve to look at before choosing how much to cut.

    The same command goes on where it stopped, point by point.
    """
    from lmprune.evaluation.gate import Gate
    from lmprune.models.cut import open_cut, safe_name
    from lmprune.quiet import quiet_bars

    gate = Gate(settings.knowledge_holds, settings.reasoning_falls)
    out = output or Path(f"{safe_name(open_cut(model).name)}-sweep")
    quiet_bars()
    from lmprune.reporting.collect import Collected
    from lmprune.reporting.words import gate_text, summary, table
    from lmprune.sweeping.run import SweepRun

    run = SweepRun(model, out, settings, data, show.remark)
    prepared = run.prepare()
    if settings.launcher is not None:
        if (printed := _launch(run, prepared)) is not None:
            return show.result(printed, {"commands": printed.splitlines()}, json)
        left = [point for point in run.wanted(prepared) if not (out / "results" / point.name).is_dir()]
    else:
        left = run.measure(prepared)
    if not left and not settings.points:
        run.bench(prepared)
    if not (out / "results" / "baseline").is_dir():  # a process of a launcher that has other points
        return show.result(str(out), {"run": str(out)}, json)
    found = Collected.read(out, gate)
    lines = [show.table(*table(found)), "", *summary(found), gate_text(found), ""]
    if left:
        lines += [f"left: {', '.join(point.name for point in left)}. Run the same command to go on", ""]
    lines.append(f"{out}\nlook at it: lmprune report {out} -o report.html")
    result = {
        "run": str(out),
        "left": [point.name for point in left],
        "passes": dict(prepared.passes),
        "scores": {name: {task: score.value for task, score in r.scores.items()} for name, r in found.results.items()},
        "warnings": found.warnings(),
    }
    show.result("\n".join(lines), result, json)


def _launch(run: SweepRun, prepared: Sweep) -> str | None:
    """Hand the points to processes; the commands instead, where they are to be printed."""
    from lmprune.sweeping.launch import arguments, commands, gpus, run_all, shares

    parts = shares(run.wanted(prepared), run.settings.processes or max(1, gpus()))
    lines = [arguments(run.model, run.out, run.settings, run.data, part) for part in parts]
    if run.settings.launcher == "print":
        return commands(lines)
    run_all(lines)
    return None
