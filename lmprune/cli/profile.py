"""``lmprune profile``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lmprune.cli import show
from lmprune.cli.options import NOT_JOINED, Model, with_options
from lmprune.profiling.settings import ProfileSettings
from lmprune.text.sources import DataSettings


@with_options(ProfileSettings, DataSettings, useless=(NOT_JOINED,))
def profile(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The profile to write.", metavar="PROFILE.json")],
    settings: ProfileSettings,
    data: DataSettings,
) -> None:
    """Measure the angular distance over every block of layers, in one pass over calibration text.

    Examples:
        lmprune profile demo -o profile.json --samples 256
        lmprune profile Qwen/Qwen3-0.6B -o profile.json --data text.jsonl --until 0.95 --drop 7
    """
    from lmprune.cuts.plan import spell
    from lmprune.files import check_output_file
    from lmprune.forward.processes import Processes
    from lmprune.profiling.run import profile_model
    from lmprune.quiet import quiet_bars

    check_output_file(output, (".json",))
    quiet_bars()
    processes = Processes.join(cpu=settings.device == "cpu")
    try:
        measured = profile_model(model, output, settings, data)
    finally:
        processes.leave()
    if not processes.main:
        return
    sizes = sorted({n for n in (1, measured.layers // 8, measured.layers // 4, measured.layers // 2) if n})
    blocks = [_block(measured, n) for n in sizes]
    lines = [
        f"{measured.model}: {measured.layers} layers, {measured.samples} samples, {measured.tokens} tokens of "
        f"{measured.source}"
    ]
    for block in blocks:
        within = "" if block["interval"] is None else " [{:.4f}, {:.4f}]".format(*block["interval"])
        lines.append(
            f"best block of {block['n']:>2}: layers {spell(range(block['start'], block['start'] + block['n']))}, "
            f"distance {block['distance']:.4f}{within}; {block['certainty']}"
        )
    result = {
        "out": output,
        "model": measured.model,
        "layers": measured.layers,
        "samples": measured.samples,
        "tokens": measured.tokens,
        "rows": blocks,
    }
    show.result("\n".join([*lines, str(output)]), result)


def _block(measured: Any, n: int) -> dict[str, Any]:
    start = measured.best_block(n)
    certainty, interval = measured.certainty(n), measured.interval(start, n)
    return {
        "n": n,
        "start": start,
        "distance": measured.distance(start, n),
        "interval": None if interval is None else list(interval),
        "share": None if interval is None else certainty.shares.get(start, 0.0),
        "certainty": certainty.describe(),
    }
