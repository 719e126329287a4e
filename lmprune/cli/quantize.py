"""``lmprune quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmprune.cli import show
from lmprune.cli.options import MODEL, with_options
from lmprune.text.sources import DataSettings
from lmprune.writing.quantizing import QuantizeSettings


@with_options(QuantizeSettings, DataSettings)
def quantize(
    model: Annotated[str, typer.Argument(help=MODEL)],
    out: Annotated[Path, typer.Argument(help="New folder for the quantised checkpoint.")],
    quantization: Annotated[str, typer.Option(help="nf4 (4 bits) or int8 (8 bits), of bitsandbytes.", metavar="Q")],
    settings: QuantizeSettings,
    data: DataSettings,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a model, pruned or not, in 4 or 8 bits, as a checkpoint that transformers loads as it is."""
    from lmprune.quiet import quiet_bars
    from lmprune.writing.quantizing import quantize as run

    quiet_bars()
    done = run(model, out, quantization, settings, data)
    size = f"{show.size(done.bytes_before)} -> {show.size(done.bytes_after)}"
    loss = ""
    if done.loss_before is not None and done.loss_after is not None:
        loss = f"\nloss {done.loss_before:.4f} -> {done.loss_after:.4f} nats a token"
    show.result(f"{done.quantization}: {size}{loss}\n{done.path}", done.to_data(), json)
