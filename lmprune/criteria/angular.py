"""Drop the block of consecutive layers whose input and output lie closest.

Gromov et al. 2024, arXiv 2403.17887, section 3.2:
l*(n) = argmin over l of d(x^(l), x^(l+n)); the layers l* .. l*+n-1 go.
"""

from __future__ import annotations

from lmprune.cuts.plan import Plan
from lmprune.profiling.distances import Profile


def choose(layers: int, count: int, profile: Profile | None) -> Plan:
    """The block of ``count`` layers with the smallest mean angular distance."""
    assert profile is not None and profile.layers == layers
    start = profile.best_block(count)
    return Plan(layers, tuple(range(start, start + count)))
