"""``lmprune export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lmprune.cli import show
from lmprune.cli.options import Model, with_options
from lmprune.errors import sized


@with_options()
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The GGUF file to write.")],
    type: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "auto"],
        typer.Option(
            "--type",
            help="GGUF's type: f32, f16, bf16, q8_0, or auto: as it is stored. llama-quantize makes others.",
            metavar="T",
        ),
    ] = "f16",
    converter: Annotated[
        str | None,
        typer.Option(
            help="llama.cpp's converter: a command, or the path of convert_hf_to_gguf.py. Default: the one installed.",
            metavar="CMD",
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Compare next tokens with transformers, where xllamacpp is.")
    ] = True,
) -> None:
    """Write a GGUF file for llama.cpp by its own converter, and prove that it is the same model.

    Refuses a cut that llama.cpp would silently run as another model.

    Examples:
        lmprune export pruned/ model.gguf
        lmprune export pruned/ model.gguf --type q8_0 --no-compare
    """
    from lmprune.models.runtimes import UNKNOWN
    from lmprune.quiet import quiet_bars
    from lmprune.writing.exporting import export as run

    quiet_bars()
    done = run(model, out, type, converter=converter, compare=compare)
    if done.verdict.verdict == UNKNOWN:
        show.remark(f"llama.cpp: {done.verdict.why}")
    if done.not_compared is not None:
        show.remark(f"next tokens not compared: {done.not_compared}")
    proven = "" if done.difference is None else f"; next tokens as by transformers, to {done.difference:.3f} nats"
    keys = f"; added {', '.join(done.verdict.keys)}" if done.verdict.keys else ""
    show.result(f"{done.layers} layers, {done.type}, {sized(done.bytes)}{keys}{proven}\n{out}", done.to_data())
