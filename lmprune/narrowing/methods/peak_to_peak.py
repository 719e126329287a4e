"""Neurons by the span of their gate's and up's weights, as optipfair's default does: a control, which looks at no text.

The largest weight plus the size of the smallest, summed over both maps (optipfair 0.4.2, "MAW").
"""

from __future__ import annotations

from torch import Tensor

from lmprune.narrowing.base import Inner, Order, by_score

AXIS = "ffn"


def order(inner: Inner) -> Order:
    """As the module says."""
    first, *rest = (_span(reader.double()) for reader in inner.readers)
    return by_score(sum(rest, first))


def _span(weight: Tensor) -> Tensor:
    return weight.amax(1) + weight.amin(1).abs()
