"""Drop the block of consecutive layers whose input and output lie closest.

Gromov et al. 2024, arXiv 2403.17887, section 3.2:
l*(n) = argmin over l of d(x^(l), x^(l+n)); the layers l* .. l*+n-1 go.
"""

from __future__ import annotations

from typing import Any

from lmprune.criteria.evidence import Choice, Evidence, free_blocks
from lmprune.cuts.plan import Plan


def choose(count: int, evidence: Evidence) -> Choice:
    """The block of ``count`` layers with the smallest mean angular distance."""
    starts = [block.start for block in free_blocks(evidence, count)]
    profile = evidence.profile()
    start = min(starts, key=lambda start: (profile.distance(start, count), start))
    distance, interval = profile.distance(start, count), profile.interval(start, count)
    certainty = profile.certainty(count)
    said: dict[str, Any] = {}
    if interval is not None:
        said["interval"] = [round(bound, 6) for bound in interval]
        said["resamples"] = {str(where): round(share, 4) for where, share in certainty.shares.items()}
    return Choice(
        Plan(evidence.layers, tuple(range(start, start + count))),
        f"angular distance d({start}, {start + count}) = {distance:.4f}; {certainty.describe()} (of the distance, "
        "not the damage)",
        {
            "start": start,
            "distance": round(distance, 6),
            **said,
            "token": profile.token,
            "samples": profile.samples,
            "data": profile.source,
            "data_hash": profile.data_hash,
            "seed": profile.seed,
        },
    )
