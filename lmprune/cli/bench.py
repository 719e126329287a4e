"""``lmprune bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmprune.benching.settings import BenchSettings
from lmprune.cli import show
from lmprune.cli.options import MODEL, there, with_options
from lmprune.errors import sized

if TYPE_CHECKING:
    from lmprune.benching.rows import Bench, Ratio, Row


@with_options(BenchSettings)
def bench(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help=f"{MODEL} The first is the reference."), there
    ],
    settings: BenchSettings,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Also write the result there, for a report.", metavar="BENCH.json"),
    ] = None,
) -> None:
    """Measure speed and memory of models side by side, in turns.

    A single recipe is compared with its own base.

    Examples:
        lmprune bench recipe.yml
        lmprune bench demo pruned/ --prompts 64 --batch-sizes 1 --quantizations nf4 -o bench.json
    """
    from lmprune.benching.measuring import bench as run
    from lmprune.files import check_output_file, write_json
    from lmprune.quiet import quiet_bars

    if output is not None:
        check_output_file(output)
    quiet_bars()
    done = run(models, settings)
    if output is not None:
        write_json(output, done.to_data())
    show.result(_table(done), done.to_data())


def _table(done: Bench) -> str:
    head = (
        *("model", "layers", "params", "weights", "prompt", "batch", "prefill t/s", "decode t/s", "p50 ms", "p90 ms"),
        *("peak", "GFLOP/t", "J/t", "prefill x", "decode x", "ideal"),
    )
    text = show.table(head, [_cells(row) for row in done.rows], numbers=True)
    runs, warmup = done.settings["runs"], done.settings["warmup"]
    note = (
        f"{done.device}, {done.threads} thread{'s' * (done.threads > 1)}; {runs} runs in turns after {warmup} that do "
        "not count; t: token; x: times the first model, median and the middle 80 % of runs; ideal: by the weights "
        "that a token passes through"
    )
    return "\n".join([text, "", note])


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        str(row.layers),
        f"{row.parameters / 1e6:.1f}M",
        sized(row.weight_bytes),
        str(row.prompt),
        str(row.batch_size),
        f"{row.prefill_tokens_per_second:,.0f}",
        f"{row.decode_tokens_per_second:,.1f}",
        f"{1000 * row.decode_p50:.2f}",
        f"{1000 * row.decode_p90:.2f}",
        "-" if row.peak_bytes is None else sized(row.peak_bytes),
        "-" if row.flops_per_token is None else f"{row.flops_per_token / 1e9:.3g}",
        "-" if row.joules_per_token is None else f"{row.joules_per_token:.3g}",
        _ratio(row.prefill_ratio),
        _ratio(row.decode_ratio),
        f"{row.ideal:.2f}",
    )


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} [{ratio.low:.2f},{ratio.high:.2f}]"
