"""Drop attention and MLP sublayers one by one, each time the one that changes the model's output least.

FinerCut, Zhang et al. 2024, arXiv 2405.18218: the candidates are the 2L sublayers; the distance of the output from the
whole model's is measured anew after each removal. The paper offers several distances; here it is the divergence ``kl``
unless another objective is asked for. A number of n layers is 2n sublayers; a layer that loses both goes as a whole.
"""

from __future__ import annotations

from lmprune.criteria.evidence import Choice, Evidence, sublayers_one_after_another

OBJECTIVE = "kl"
"""One of the paper's distances of the output."""
SUBLAYERS = True
"""What takes whole layers only refuses it."""


def choose(count: int, evidence: Evidence) -> Choice:
    """``2 * count`` sublayers, one after the other."""
    return sublayers_one_after_another(2 * count, evidence)
