"""Drop the deepest layers but keep the last.

The simple heuristic of Gromov et al. 2024, arXiv 2403.17887, section 4.4.
The paper counts layers from 1 in this place: its "layers L-n to L-1" are the 0-based layers L-n-1 .. L-2.
"""

from __future__ import annotations

from lmprune.criteria.evidence import Choice, Evidence, may_go
from lmprune.cuts.plan import Plan

READS_TEXT = False
"""Whether calibration text, or a profile of it, is read."""


def choose(count: int, evidence: Evidence) -> Choice:
    """The ``count`` layers before the last one; protected ones are passed over."""
    layers = evidence.layers
    which = "layer" if count == 1 else f"{count} layers"
    return Choice(
        Plan(layers, may_go(evidence, count, {layers - 1})[-count:]),
        f"the deepest {which} but the last, as in the paper's simple heuristic",
    )
