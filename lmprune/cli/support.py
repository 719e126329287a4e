"""``lmprune support``."""

from __future__ import annotations

from typing import Annotated

import typer

from lmprune.cli import show


def support(json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False) -> None:
    """Print which architectures are right in memory, by plain mergekit and by prune, and why others are refused."""
    from lmprune.writing.support import rows

    head = ("architecture", "in memory", "plain mergekit", "prune", "writer", "reason")
    text = show.table(
        head, [(r.architecture, r.in_memory, r.plain_mergekit, r.prune, r.writer, r.reason) for r in rows()], text=True
    )
    show.result(text, [row.to_data() for row in rows()], json)
