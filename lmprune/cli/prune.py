"""``lmprune prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lmprune.cli import show
from lmprune.cli.options import RECIPE, AllowPickle, TrustRemoteCode, Useless, there, with_options, without
from lmprune.errors import sized


@with_options(useless=(Useless(("logits",), without("verify"), "--no-verify proves nothing"),))
def prune(
    recipe: Annotated[str, typer.Argument(help=RECIPE), there],
    out: Annotated[Path, typer.Argument(help="New folder for the smaller checkpoint.")],
    writer: Annotated[
        Literal["auto", "mergekit", "copy"],
        typer.Option(help="Who writes: auto, mergekit, or copy (our own tensor copier).", metavar="W"),
    ] = "auto",
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Prove the result before it appears.")] = True,
    logits: Annotated[
        bool, typer.Option("--logits/--no-logits", help="Compare logits too; needs memory for the pruned model.")
    ] = True,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Write the pruned checkpoint that a recipe describes, and prove it.

    Examples:
        lmprune prune recipe.yml pruned/
        lmprune prune demo-minus-3-angular pruned/ --writer copy
    """
    from lmprune.cli.check import remark_on_runtimes
    from lmprune.quiet import quiet_bars
    from lmprune.writing.pruning import prune as run

    quiet_bars()
    done = run(
        recipe,
        out,
        writer=writer,
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
        "out": out,
        "kept": list(done.plan.kept),
        "dropped": list(done.plan.dropped),
        "writer": done.writer,
        "writer_reason": done.reason,
        "bytes_before": done.bytes_before,
        "bytes_after": done.bytes_after,
        "proof": done.proof.to_data() if done.proof else None,
    }
    text = (
        f"{done.plan.describe()}; {sized(done.bytes_before)} -> {sized(done.bytes_after)}\n"
        f"written by {done.writer} ({done.reason}); {proven}\n{out}"
    )
    show.result(text, data)
