"""``lmprune verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmprune.cli import show
from lmprune.cli.options import RECIPE, AllowPickle, TrustRemoteCode, readable, there, with_options


@with_options()
def verify(
    recipe: Annotated[str, typer.Argument(help=f"{RECIPE} The checkpoint was made from it."), there],
    out: Annotated[Path, typer.Argument(help="The checkpoint, whoever wrote it."), readable],
    logits: Annotated[
        bool, typer.Option("--logits/--no-logits", help="Compare logits too; needs memory for the pruned model.")
    ] = True,
    note: Annotated[bool, typer.Option("--note", help="Write the proof into the checkpoint's lmprune.json.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Prove that a checkpoint is what its recipe promises.

    Exit code 3 and a list of differences where it is not; 1 where either cannot be read.

    Examples:
        lmprune verify recipe.yml pruned/
        lmprune verify recipe.yml pruned/ --no-logits --note
    """
    from lmprune.quiet import quiet_bars
    from lmprune.writing.verify import verify as run

    quiet_bars()
    proof = run(
        recipe,
        out,
        logits=logits,
        note=note,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    if proof.logits_skipped:
        show.remark(f"logits not compared: {proof.logits_skipped}")
    lines = [f"differs: {line}" for line in proof.differences] or [
        f"{out} is what its recipe promises: {proof.tensors} tensors equal"
        + (", logits equal" if proof.logits_compared else "")
    ]
    show.result("\n".join(lines), proof.to_data())
    if proof.differences:
        raise typer.Exit(3)
