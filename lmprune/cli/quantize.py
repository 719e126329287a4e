"""``lmprune quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lmprune.cli import show
from lmprune.cli.options import NOT_JOINED, Model, Useless, names_of, with_options, without
from lmprune.errors import sized
from lmprune.text.sources import DataSettings
from lmprune.writing.quantizing import QuantizeSettings


@with_options(
    QuantizeSettings,
    DataSettings,
    useless=(
        NOT_JOINED,
        Useless(("max_length", "seed", *names_of(DataSettings)), without("samples"), "--samples 0 measures no loss"),
    ),
)
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="New folder for the quantised checkpoint.")],
    quantization: Annotated[
        Literal["nf4", "int8"], typer.Option(help="nf4 (4 bits) or int8 (8 bits), of bitsandbytes.", metavar="Q")
    ],
    settings: QuantizeSettings,
    data: DataSettings,
) -> None:
    """Write a model, pruned or not, in 4 or 8 bits, as a checkpoint that transformers loads as it is.

    Examples:
        lmprune quantize pruned/ small/ --quantization nf4
        lmprune quantize recipe.yml small/ --quantization int8 --samples 0
    """
    from lmprune.quiet import quiet_bars
    from lmprune.writing.quantizing import quantize as run

    quiet_bars()
    done = run(model, out, quantization, settings, data)
    size = f"{sized(done.bytes_before)} -> {sized(done.bytes_after)}"
    loss = ""
    if done.loss_before is not None and done.loss_after is not None:
        loss = f"\nloss {done.loss_before:.4f} -> {done.loss_after:.4f} nats a token"
    show.result(f"{done.quantization}: {size}{loss}\n{done.path}", done.to_data())
