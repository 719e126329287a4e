"""``lmprune prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lmprune.cli import show
from lmprune.cli.options import AllowPickle, TrustRemoteCode


def prune(
    recipe: Annotated[
        str, typer.Argument(help="The recipe: a .yml file, or a folder or Hub repository with a recipe.yml.")
    ],
    out: Annotated[Path, typer.Argument(help="New folder for the smaller checkpoint.")],
    writer: Annotated[str, typer.Option(help="Who writes: auto, mergekit, or copy (our own tensor copier).")] = "auto",
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Prove the result before it appears.")] = True,
    logits: Annotated[
        bool, typer.Option("--logits/--no-logits", help="Compare logits too; needs memory for the pruned model.")
    ] = True,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write the pruned checkpoint that a recipe describes, and prove it."""
    from lmprune.cli.check import remark_on_runtimes
    from lmprune.quiet import quiet_bars
    from lmprune.writing.pruning import prune as run

    quiet_bars()
    done = run(
        recipe,
        out,
        writer=writer,  # type: ignore[arg-type]
        check=verify,
        logits=logits,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    proven = "not checked"
    if done.proof:
        exact = ", logits equal to the model pruned in memory" if done.proof.logits_compared else ""
        proven = f"checked: {done.proof.tensors} tensors{exact}"
        if done.proof.logits_skipped:
            show.remark(f"logits not compared: {done.proof.logits_skipped}")
    remark_on_runtimes(str(out), trust_remote_code)
    data: dict[str, Any] = {
        "out": str(out),
        "kept": list(done.plan.kept),
        "dropped": list(done.plan.dropped),
        "writer": done.writer,
        "writer_reason": done.reason,
        "bytes_before": done.bytes_before,
        "bytes_after": done.bytes_after,
        "proof": done.proof.to_data() if done.proof else None,
    }
    text = (
        f"{done.plan.describe()}; {show.size(done.bytes_before)} -> {show.size(done.bytes_after)}\n"
        f"written by {done.writer} ({done.reason}); {proven}\n{out}"
    )
    show.result(text, data, json)
