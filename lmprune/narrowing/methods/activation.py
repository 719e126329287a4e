"""Neurons by the size of what they write: the root mean square of each, times the norm of its weights that write.

A control: the least squares of one neuron alone, which does not see that others can do its work.
"""

from __future__ import annotations

from lmprune.narrowing.base import Inner, Order, by_score

AXIS = "ffn"


def order(inner: Inner) -> Order:
    """As the module says."""
    rms = (inner.gram.diagonal() / max(1, inner.tokens)).sqrt()
    return by_score(rms * inner.writer.double().norm(dim=1))
