"""``lmprune support``."""

from __future__ import annotations

from typing import Annotated

import typer

from lmprune.cli import show
from lmprune.cli.options import with_options
from lmprune.errors import UsageError, nearest


@with_options()
def support(
    architecture: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Only architectures with this in their name.")
    ] = None,
) -> None:
    """Print which architectures are right in memory, by plain mergekit and by prune, and why others are refused.

    Examples:
        lmprune support
        lmprune support qwen3
    """
    from lmprune.writing.support import rows

    wanted = (architecture or "").lower()
    found = [row for row in rows() if wanted in row.architecture.lower()]
    if not found:
        known = [row.architecture for row in rows()]
        raise UsageError(
            f"no architecture {architecture!r} was measured{nearest(wanted, known)}. See `lmprune support`"
        )
    head = ("architecture", "in memory", "plain mergekit", "prune", "writer", "reason")
    text = show.table(
        head, [(r.architecture, r.in_memory, r.plain_mergekit, r.prune, r.writer, r.reason) for r in found], text=True
    )
    show.result(text, {"rows": [row.to_data() for row in found]})
