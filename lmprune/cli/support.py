"""``lmprune support``."""

from __future__ import annotations

from typing import Annotated

import typer

from lmprune.cli import show


def support(json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False) -> None:
    """Print which architectures are right in memory, by plain mergekit and by prune, and why others are refused."""
    from lmprune.writing.support import rows, table

    show.result(table(), [row.to_data() for row in rows()], json)
