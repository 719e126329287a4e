"""Key-value groups, each with the query heads that share it, by least squares as in `ffn`."""

from __future__ import annotations

from lmprune.narrowing.base import Inner, Order
from lmprune.narrowing.elimination import eliminate

AXIS = "groups"


def order(inner: Inner) -> Order:
    """As the module says."""
    found = eliminate(inner.gram, inner.writer, inner.units, step=1)
    return Order(found.order, found.costs)
