"""The picture of a training: its losses by step."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from matplotlib.figure import Figure

from lmprune.drawing.canvas import COLOURS, render
from lmprune.files import write_bytes


def draw_losses(
    path: Path,
    training: Iterable[tuple[int, float]],
    held_out: Iterable[tuple[int, float]],
    pruned: float,
    original: float | None,
) -> None:
    """Write losses in nats per token by step as a PNG, with the levels of the pruned and the original model.

    Raises:
        OutputError: the file cannot be written.
    """
    blue, red, green = COLOURS[:3]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(pruned, color=red, linestyle=":", label=f"pruned {pruned:.3f}")
    if original is not None:
        axes.axhline(original, color=green, linestyle=":", label=f"original {original:.3f}")
    if training:
        axes.plot(*zip(*training), color=blue, alpha=0.35, label="training")
    axes.plot(*zip(*held_out), color=blue, marker="o", markersize=3, label="held out")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.legend()
    write_bytes(path, render(figure, "png", "lmprune", dpi=120))
