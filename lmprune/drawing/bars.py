"""Pictures of costs as bars: criteria side by side, and what every single layer is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from lmprune.drawing.canvas import COLOURS, GREY, render, whole_numbers
from lmprune.errors import UsageError
from lmprune.files import write_bytes

KINDS = (".png", ".svg", ".pdf")


def draw_choices(path: Path, bars: Sequence[tuple[str, str, float]], chance: float | None, title: str) -> None:
    """Write one bar for each (criterion, what goes, nats a token that the loss rises by), the best on top.

    Args:
        chance: the rise of sets of layers drawn at random, as a line.

    Raises:
        UsageError: the file's ending is not one of `KINDS`.
        OutputError: the file cannot be written.
    """
    figure = Figure(figsize=(8, 1.2 + 0.35 * len(bars)), layout="constrained")
    axes = figure.subplots()
    places = range(len(bars))
    axes.barh(places, [rise for *_, rise in bars], color=COLOURS[0])
    for place, (_, layers, rise) in enumerate(bars):
        axes.annotate(
            layers, (max(rise, 0.0), place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(list(places), [name for name, *_ in bars])
    axes.invert_yaxis()
    axes.margins(x=0.25)
    if chance is not None:
        axes.axvline(chance, color=GREY, linestyle=":", label="median of random draws")
        axes.legend(loc="lower right", fontsize=8)
    axes.set(title=title, xlabel="loss on unseen text rises by (nats a token)")
    _write(figure, path)


def draw_layers(path: Path, values: Mapping[str, tuple[str, Mapping[int, float]]], title: str) -> None:
    """Write a row of bars by layer for each of ``values``: name -> what is measured, and layer -> value.

    Values that are many times the median leave the picture at the top, so that the others can be told apart.

    Raises:
        UsageError: the file's ending is not one of `KINDS`.
        OutputError: the file cannot be written.
    """
    figure = Figure(figsize=(8, 0.6 + 1.9 * len(values)), layout="constrained")
    rows = figure.subplots(len(values), 1, sharex=True, squeeze=False)
    figure.suptitle(title, fontsize=11)
    for number, (axes, (name, (label, found))) in enumerate(zip(rows[:, 0], values.items())):
        axes.bar(list(found), list(found.values()), color=COLOURS[number % len(COLOURS)])
        top = sorted(found.values())[len(found) * 3 // 4] * 3
        if 0 < top < max(found.values()):
            axes.set_ylim(min(0.0, *found.values()), top)
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.set_ylabel(f"{name}\n{label}", fontsize=8)
    rows[-1, 0].set_xlabel("layer that is switched off")
    whole_numbers(rows[-1, 0].xaxis)
    _write(figure, path)


def check_picture(path: Path) -> None:
    """Refuse a file of another kind than `KINDS`, before anything is measured.

    Raises:
        UsageError: naming them.
    """
    if path.suffix.lower() not in KINDS:
        raise UsageError(f"{path}: unknown kind of picture {path.suffix!r}. End the name in {', '.join(KINDS)}")


def _write(figure: Figure, path: Path) -> None:
    check_picture(path)
    write_bytes(path, render(figure, path.suffix.lower()[1:], "lmprune"))
