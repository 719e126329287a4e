"""Drop the deepest layers but keep the last.

The simple heuristic of Gromov et al. 2024, arXiv 2403.17887, section 4.4.
The paper counts layers from 1 in this place: its "layers L-n to L-1" are the 0-based layers L-n-1 .. L-2.
"""

from __future__ import annotations

from lmprune.cuts.plan import Plan
from lmprune.profiling.distances import Profile


def choose(layers: int, count: int, profile: Profile | None = None) -> Plan:
    """The ``count`` layers before the last one."""
    return Plan(layers, tuple(range(layers - count - 1, layers - 1)))
