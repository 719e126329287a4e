"""Which layers of a model stay and which go, as a row of numbered blocks."""

from __future__ import annotations

import math
from collections.abc import Collection

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lmprune.drawing.canvas import COLOURS, render

PER_ROW = 20
_KEPT, _DROPPED = COLOURS[0], "#ffffff"


def layers_picture(layers: int, dropped: Collection[int], title: str) -> bytes:
    """A PNG of ``layers`` blocks, numbered from 0; the ``dropped`` ones are empty."""
    rows = math.ceil(layers / PER_ROW)
    picture = Figure(figsize=(8.0, 0.55 * rows + 0.6), layout="constrained")
    axes = picture.subplots()
    for layer in range(layers):
        x, y, gone = layer % PER_ROW, rows - 1 - layer // PER_ROW, layer in dropped
        style = "--" if gone else "-"
        axes.add_patch(
            Rectangle((x, y), 0.9, 0.8, facecolor=_DROPPED if gone else _KEPT, edgecolor="#555555", linestyle=style)
        )
        axes.text(x + 0.45, y + 0.4, str(layer), ha="center", va="center", fontsize=8,
                  color="#777777" if gone else "#ffffff")  # fmt: skip
    axes.set(xlim=(-0.1, min(layers, PER_ROW)), ylim=(-0.15, rows))
    axes.set_axis_off()
    axes.set_title(title, fontsize=10)
    return render(picture, "png", "layers")
