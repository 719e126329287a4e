"""Narrowing: what of each layer's width may go. Second moments in, an order of neurons or directions of the stream out.

A method is one file in `methods` with an ``AXIS`` and one line in `WIDTHS`; other packages add theirs by an entry point
in the group ``lmprune.widths`` that names such a file.
"""

from __future__ import annotations

from lmprune.narrowing.base import Inner, Method, Order, Rotation
from lmprune.narrowing.methods import activation, ffn, groups, magnitude, peak_to_peak
from lmprune.plugins import Table

__all__ = ["WIDTHS", "Inner", "Method", "Order", "Rotation"]

WIDTHS: Table[Method] = Table(
    "--neurons",
    "lmprune.widths",
    {
        "ffn": ffn,
        "activation": activation,
        "magnitude": magnitude,
        "peak-to-peak": peak_to_peak,
        "groups": groups,
    },
    needs=("AXIS", "order"),
)
"""Orders of neurons and of key-value groups. The hidden size has one method, `lmprune.narrowing.methods.slice`."""
