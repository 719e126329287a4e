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
    """One model: parameters left in percent, times as fast if known, nats added as cut, and once repaired."""

    parameters: float
    speed: float | None
    cut: float
    repaired: float


def draw(spots: Sequence[Spot], path: Path) -> None:
    """Write the picture to ``path``: .png, .svg or .pdf."""
    sides = [("parameters left, without embeddings, %", [spot.parameters for spot in spots])]
    speeds = [spot.speed for spot in spots if spot.speed is not None]
    if len(speeds) == len(spots):
        sides.append(("times as fast", speeds))
    figure = Figure(figsize=(3.75 * len(sides), 3.0), layout="constrained")
    by_size, *_ = every = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    for axes, (across, places) in zip(every, sides):
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
