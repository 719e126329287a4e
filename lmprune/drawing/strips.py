"""Which layers of a model stay and which go, as a row of numbered blocks."""

from __future__ import annotations

import math
from collections.abc import Collection

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lmprune.drawing.canvas import COLOURS, render

PER_ROW = 20
_KEPT, _PARTLY, _DROPPED = COLOURS[0], COLOURS[4], "#ffffff"


def layers_picture(layers: int, dropped: Collection[int], partly: Collection[int], title: str) -> bytes:
    """A PNG of ``layers`` blocks, numbered from 0; the ``dropped`` ones are empty, those that go ``partly`` hatched."""
    rows = math.ceil(layers / PER_ROW)
    picture = Figure(figsize=(8.0, 0.55 * rows + 0.6), layout="constrained")
    axes = picture.subplots()
    for layer in range(layers):
        x, y, gone = layer % PER_ROW, rows - 1 - layer // PER_ROW, layer in dropped
        style = "--" if gone else "-"
        axes.add_patch(
            Rectangle((x, y), 0.9, 0.8, facecolor=_DROPPED if gone else _PARTLY if layer in partly else _KEPT,
                      edgecolor="#555555", linestyle=style, hatch="//" if layer in partly else None)
        )  # fmt: skip
        axes.text(x + 0.45, y + 0.4, str(layer), ha="center", va="center", fontsize=8,
                  color="#777777" if gone else "#000000" if layer in partly else "#ffffff")  # fmt: skip
    axes.set(xlim=(-0.1, min(layers, PER_ROW)), ylim=(-0.15, rows))
    axes.set_axis_off()
    axes.set_title(title, fontsize=10)
    return render(picture, "png", "layers")
