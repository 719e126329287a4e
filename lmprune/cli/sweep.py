"""``lmprune sweep``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lmprune.cli import show
from lmprune.cli.options import Model, Useless, given, names_of, with_options
from lmprune.criteria import OWN
from lmprune.evaluation.gate import Gate
from lmprune.sweeping.points import BASELINE
from lmprune.sweeping.settings import SweepSettings
from lmprune.text.sources import DataSettings


def _chosen_by(values: Mapping[str, Any], test: Callable[[Any], bool]) -> bool:
    """Whether nothing is healed, and all criteria are ours and pass the test."""
    names = [name.strip() for name in values["criteria"].split(",")]
    return not (values["heal"] or values["repair"]) and all(name in OWN and test(OWN[name]) for name in names)


def _reads_nothing(values: Mapping[str, Any]) -> bool:
    """Whether no calibration text is read."""
    return _chosen_by(values, lambda chooser: not getattr(chooser, "READS_TEXT", True))


def _content_with_a_profile(chooser: Any) -> bool:
    return chooser in (OWN["angular"], OWN["block-influence"]) or not getattr(chooser, "READS_TEXT", True)


_USELESS = (
    Useless(("profile", "samples"), _reads_nothing, "no criterion reads a profile"),
    Useless(
        tuple(names_of(DataSettings)),
        lambda values: not values["agree"] and _reads_nothing(values),
        "no text is read",
    ),
    Useless(("samples",), given("profile"), "--profile is measured already"),
    Useless(
        tuple(names_of(DataSettings)),
        lambda values: values["profile"] and not values["agree"] and _chosen_by(values, _content_with_a_profile),
        "--profile is measured already",
    ),
    Useless(("bench",), given("points"), "speed is measured once all points are"),
    Useless(("bench", *names_of(Gate)), lambda values: values["launcher"] == "print", "nothing is measured now"),
)


@with_options(SweepSettings, DataSettings, Gate, useless=_USELESS)
def sweep(
    model: Model,
    settings: SweepSettings,
    data: DataSettings,
    gate: Gate,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The run folder. Default: MODEL-sweep.", metavar="RUN/")
    ] = None,
) -> None:
    """Measure many cuts of one model: the curve to look at before choosing how much to cut.

    The same command goes on where it stopped, point by point.

    Examples:
        lmprune sweep demo -o sweep/
        lmprune sweep Qwen/Qwen3-0.6B --fractions 0.1,0.25 --criteria angular,best --tasks arc_easy,gsm8k --limit 200
        lmprune sweep demo --tasks my_task --include_path my_tasks/ --repair refit
    """
    from lmprune.models.cut import open_cut, safe_name
    from lmprune.quiet import quiet_bars

    out = output or Path(f"{safe_name(open_cut(model).name)}-sweep")
    quiet_bars()
    from lmprune.reporting.collect import Collected
    from lmprune.reporting.words import agreement_text, gate_text, quantizations_table, summary, table
    from lmprune.sweeping.run import sweep as measure

    done = measure(model, out, settings, data)
    if done.commands:
        return show.result("\n".join(done.commands), {"out": out, "commands": list(done.commands)})
    if BASELINE not in done.measured:  # a process of a launcher that has other points
        return show.result(str(out), {"out": out})
    found = Collected.read(out, gate)
    lines = [show.table(*table(found)), ""]
    if found.few_bits():
        lines += [show.table(*quantizations_table(found)), ""]
    lines += [*([said] if (said := agreement_text(found)) else []), *summary(found), gate_text(found), ""]
    if done.left:
        lines += [f"left: {', '.join(done.left)}. Run the same command to go on", ""]
    lines.append(f"{out}\nlook at it: lmprune report {out} -o report.html")
    result = {
        "out": out,
        "left": list(done.left),
        "passes": dict(done.sweep.passes),
        "scores": {
            name: {task: show.measured(score.value, score.stderr) for task, score in results.scores.items()}
            for name, results in found.results.items()
        },
        "agreement": asdict(found.agreements) if found.agreements is not None else None,
        "warnings": found.warnings(),
    }
    show.result("\n".join(lines), result)
