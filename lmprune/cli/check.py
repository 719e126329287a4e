"""``lmprune check``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from lmprune.cli import show
from lmprune.cli.options import AllowPickle, Model, TrustRemoteCode, with_options

if TYPE_CHECKING:
    from lmprune.cuts.plan import Plan
    from lmprune.models.cut import Cut
    from lmprune.models.runtimes import Verdict

RUNTIME_HELP = "transformers, vllm, llama.cpp and mlx, or some of them. Default: all."


@with_options()
def check(
    model: Model,
    runtime: Annotated[str | None, typer.Option(help=RUNTIME_HELP, metavar="R,...")] = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Say which runtimes would run this model and which, silently, another one; loads no weights.

    Exit code 3 where one is wrong. docs/runtimes.md says what each verdict rests on.

    Examples:
        lmprune check recipe.yml
        lmprune check pruned/ --runtime vllm,llama.cpp
    """
    from lmprune.models.cut import open_cut
    from lmprune.models.runtimes import WRONG, awkward, parse_runtimes
    from lmprune.models.serving import check_cut

    wanted = parse_runtimes(runtime)
    cut = open_cut(model, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    found = check_cut(cut, wanted)
    plan = plan_of(cut)
    narrowed = plan is not None and any(part.kind == "width" for part in plan.parts)
    sizes = awkward(cut.config) if narrowed and "llama.cpp" in wanted else []
    for line in sizes:
        show.remark(line)
    rows = [(v.runtime, v.verdict, v.why + places(v, plan) + (f". {v.advice}" if v.advice else "")) for v in found]
    data = {"model": cut.name, "layers": cut.layers, "rows": [verdict.to_data() for verdict in found]}
    data |= {"sizes": sizes} if sizes else {}
    show.result(show.table(("runtime", "verdict", "why"), rows, text=True), data)
    if any(verdict.verdict == WRONG for verdict in found):
        raise typer.Exit(3)


def plan_of(cut: Cut) -> Plan | None:
    """What is missing of the unpruned model, as far as it is known without opening that."""
    if cut.plan is not None:
        return cut.plan
    told = cut.folder_lineage
    return told.plan if told is not None else None


def places(verdict: Verdict, plan: Plan | None) -> str:
    """Which layers a verdict is about, with the numbers that they had in the unpruned model."""
    from lmprune.cuts.plan import spell

    if not verdict.layers:
        return ""
    several = f"; so are the layers {spell(verdict.layers)}" if len(verdict.layers) > 1 else ""
    return several + (f" (of the base: {spell(plan.kept[i] for i in verdict.layers)})" if plan is not None else "")


def remark_on_runtimes(
    model: str | Cut, trust_remote_code: bool = False, runtimes: Sequence[str] = ("llama.cpp", "vllm")
) -> None:
    """A line for each of ``runtimes`` that would not run ``model`` rightly as it is."""
    from lmprune.models.cut import open_cut
    from lmprune.models.runtimes import WRONG
    from lmprune.models.serving import check_cut

    for verdict in check_cut(open_cut(model, trust_remote_code=trust_remote_code), runtimes):
        if verdict.verdict == WRONG:
            show.remark(f"{verdict.of('this')}. See `lmprune check`")
        elif verdict.keys:
            show.remark(f"{verdict.runtime} is right {verdict.why}")
