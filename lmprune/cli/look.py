"""``lmprune show`` and ``lmprune recipes``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lmprune.cli import show as printing
from lmprune.cli.options import with_options


@with_options()
def show(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="A recipe, a checkpoint, or a Hub repository.")],
) -> None:
    """Draw which layers are kept and dropped, and tell where that comes from and what it costs.

    Examples:
        lmprune show recipe.yml
        lmprune show demo-minus-3-angular
    """
    from lmprune.sharing.subjects import look, with_runtimes
    from lmprune.sharing.telling import facts, headline, strip

    subject = with_runtimes(look(name))
    lines = [headline(subject)]
    if subject.plan is not None:
        lines += ["", *strip(subject.plan), ""]
    told = [(what if i == 0 else "", line) for what, said in facts(subject) for i, line in enumerate(said)]
    text = "\n".join(lines) + ("\n" + printing.pairs(told) if told else "")
    printing.result(text, subject.to_data())


@with_options()
def recipes(
    search: Annotated[
        str, typer.Option(help="Only those whose name, model or source holds these words.", metavar="WORDS")
    ] = "",
) -> None:
    """List the recipes that come with lmprune, and those on the Hub that are tagged lmprune.

    Examples:
        lmprune recipes
        lmprune recipes --search llama-2
    """
    from lmprune import hub
    from lmprune.cuts import library
    from lmprune.errors import NetworkError

    shipped = library.search(library.read_library(), search)
    rows = []
    for entry in shipped:
        plan = entry.recipe.plan
        by = str(entry.recipe.choice["summary"]).removeprefix("published by ").partition(",")[0]
        mark = " ⚠" * bool(entry.warning)
        drops = "sublayers" if plan.parts else f"{len(plan.dropped)}/{plan.layers}"
        rows.append((entry.name, drops + mark, by))
    parts = [printing.table(("recipe", "drops", "published by"), rows)] if rows else []
    if any(entry.warning for entry in shipped):
        parts.append("⚠ not to be used as it stands: `lmprune show NAME` says why")
    online: list[dict[str, Any]] = []
    try:
        online = hub.tagged(search)
    except NetworkError as exc:
        printing.remark(f"only those that come with lmprune: {exc}")
    if online:
        found = [(one["id"], str(one["downloads"] or 0), ", ".join(one["models"])) for one in online]
        parts.append(printing.table(("on the Hub", "downloads", "model"), found, text=True))
    text = "\n\n".join(parts) or f"no recipe holds {search!r}"
    printing.result(text, {"rows": [entry.to_data() for entry in shipped], "hub": online})
