"""A frontier: what smaller and faster models cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from lmprune.drawing.canvas import COLOURS, GREY, MARKS, render
from lmprune.files import write_bytes


@dataclass(frozen=True)
class Spot:
    """One model: parameters left in percent, times as fast, nats added as cut, and once repaired."""

    parameters: float
    speed: float
    cut: float
    repaired: float


def draw(spots: Sequence[Spot], path: Path) -> None:
    """Write the picture to ``path``: .png, .svg or .pdf."""
    figure = Figure(figsize=(7.5, 3.0), layout="constrained")
    by_size, by_speed = figure.subplots(1, 2, sharey=True)
    for axes, places, across in (
        (by_size, [spot.parameters for spot in spots], "parameters left, without embeddings, %"),
        (by_speed, [spot.speed for spot in spots], "times as fast"),
    ):
        for number, (label, values) in enumerate(
            (("as cut", [s.cut for s in spots]), ("refitted", [s.repaired for s in spots]))
        ):
            axes.plot(
                places,
                values,
                marker=MARKS[number],
                color=COLOURS[1 - number],
                label=label,
                linestyle="-" if number else "--",
            )
        axes.set_xlabel(across)
        axes.grid(alpha=0.25, color=GREY)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    by_size.invert_xaxis()
    by_size.set_ylabel("nats a token added")
    by_size.legend(fontsize=8, framealpha=0)
    write_bytes(path, render(figure, path.suffix.removeprefix(".") or "png", "frontier"))
