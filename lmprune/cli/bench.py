"""``lmprune bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmprune.bench import BenchSettings
from lmprune.cli import show
from lmprune.cli.options import with_options

if TYPE_CHECKING:
    from lmprune.bench import Bench, Ratio


@with_options(BenchSettings)
def bench(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL|RECIPE|OUT...", help="Models, recipes and checkpoints; the first is the reference."),
    ],
    settings: BenchSettings,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Also write the result there, for a report.", metavar="BENCH.json")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure speed and memory of models side by side, in turns.

    A single recipe is compared with its own base.
    """
    from lmprune.bench import Subject, measure
    from lmprune.files import check_output_file, write_json
    from lmprune.quiet import quiet_bars

    if output is not None:
        check_output_file(output)
    subjects = [Subject.named(word) for word in models]
    if len(subjects) == 1 and subjects[0].plan is not None:
        subjects.insert(0, Subject.whole(subjects[0].folder))
    quiet_bars()
    done = measure(subjects, settings)
    if output is not None:
        write_json(output, done.to_data())
    show.result(_table(done), done.to_data(), json)


def _table(done: Bench) -> str:
    wide = max(len(row.name) for row in done.rows)
    head = (
        f"{'model':<{wide}} {'layers':>6} {'params':>9} {'weights':>9} {'prompt':>6} {'batch':>5} {'prefill t/s':>11} {'decode t/s':>10} "
        f"{'p50 ms':>7} {'p90 ms':>7} {'peak':>9} {'GFLOP/t':>8} {'prefill x':>17} {'decode x':>17} {'ideal':>6}"
    )
    lines = []
    for row in done.rows:
        flops = "-" if row.flops_per_token is None else f"{row.flops_per_token / 1e9:.3g}"
        peak = "-" if row.peak_bytes is None else show.size(row.peak_bytes)
        lines.append(
            f"{row.name:<{wide}} {row.layers:>6} {row.parameters / 1e6:>8.1f}M {show.size(row.weight_bytes):>9} {row.prompt:>6} "
            f"{row.batch:>5} {row.prefill_tokens_per_second:>11,.0f} {row.decode_tokens_per_second:>10,.1f} "
            f"{1000 * row.decode_p50:>7.2f} {1000 * row.decode_p90:>7.2f} {peak:>9} {flops:>8} {_ratio(row.prefill_ratio):>17} "
            f"{_ratio(row.decode_ratio):>17} {row.ideal:>6.2f}"
        )
        if row.joules_per_token is not None:
            lines[-1] += f"  {row.joules_per_token:.3g} J/token"
    runs, warmup = done.settings["runs"], done.settings["warmup"]
    note = (
        f"{done.device}, {done.threads} threads; {runs} runs in turns after {warmup} that do not count; "
        "x: times the first model, median and the middle 80 % of runs; ideal: L/(L-n)"
    )
    return "\n".join([head, *lines, "", note])


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} [{ratio.low:.2f},{ratio.high:.2f}]"
