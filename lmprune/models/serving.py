"""What runtimes make of a cut."""

from __future__ import annotations

from collections.abc import Iterable

from lmprune.cuts.plan import is_stock
from lmprune.models.cut import Cut
from lmprune.models.runtimes import RUNTIMES, WRONG, Verdict, check, known_runtime


def check_cut(cut: Cut, runtimes: Iterable[str] = RUNTIMES) -> list[Verdict]:
    """What each runtime makes of ``cut``; errors as `check`."""
    alien = next((part for part in (cut.plan.parts if cut.plan is not None else ()) if not is_stock(part)), None)
    if alien is None:
        return check(cut.config, runtimes, cut.stored_config)
    why = f"does not know {alien.describe()}, which lmprune alone applies"
    advice = "Repair the cut without it by `lmprune heal RECIPE OUT --method refit`"
    return [Verdict(known_runtime(name), WRONG, why, advice=advice) for name in runtimes]
