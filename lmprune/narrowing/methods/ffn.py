"""Neurons by least squares: the one without which the others, solved anew, come nearest; then the next.

Exactly greedy, by lmprune.narrowing.elimination; in blocks for wide layers. By lmprune.
"""

from __future__ import annotations

from lmprune.narrowing.base import Inner, Order
from lmprune.narrowing.elimination import eliminate

AXIS = "ffn"


def order(inner: Inner) -> Order:
    """As the module says."""
    found = eliminate(inner.gram, inner.writer, inner.units)
    return Order(found.order, found.costs)
