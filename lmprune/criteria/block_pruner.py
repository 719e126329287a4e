"""Drop attention and MLP sublayers one by one, each time the one without which perplexity is lowest.

BlockPruner, Zhong et al. 2024, arXiv 2406.10594: as SLEB, over the 2L blocks of attention and MLP. A number of n layers
is 2n sublayers; a layer that loses both goes as a whole.
"""

from __future__ import annotations

from lmprune.criteria.evidence import Choice, Evidence, sublayers_one_after_another

OBJECTIVE = "loss"
"""The logarithm of perplexity."""
SUBLAYERS = True
"""What takes whole layers only refuses it."""


def choose(count: int, evidence: Evidence) -> Choice:
    """``2 * count`` sublayers, one after the other."""
    return sublayers_one_after_another(2 * count, evidence)
