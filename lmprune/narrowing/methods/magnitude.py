"""Neurons by the norm of all their weights: a control, which looks at no text."""

from __future__ import annotations

from lmprune.narrowing.base import Inner, Order, by_score

AXIS = "ffn"


def order(inner: Inner) -> Order:
    """As the module says."""
    weights = (inner.writer, *inner.readers)
    scores = sum((weight.double().square().sum(1) for weight in weights[1:]), weights[0].double().square().sum(1))
    return by_score(scores)
