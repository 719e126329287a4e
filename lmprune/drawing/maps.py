"""Pictures of a profile: maps of all blocks of layers, distance by start, and what each layer does.

Layers are counted from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from lmprune.cuts.plan import spell
from lmprune.drawing.canvas import COLOURS, MAP, MARKS, render, whole_numbers
from lmprune.errors import UsageError
from lmprune.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]
KINDS = (".png", ".svg", ".pdf")
_PLAIN, _CHOSEN = COLOURS[:2]
_SMALL = {"font.size": 9}
_DOTS: dict[str, Any] = {"marker": ".", "linestyle": "none", "color": "white", "markeredgecolor": "black"}


class Measured(Protocol):
    """What is drawn of a profile; `lmprune.Profile` says what each means."""

    @property
    def model(self) -> str: ...
    @property
    def layers(self) -> int: ...
    @property
    def samples(self) -> int: ...
    @property
    def source(self) -> str: ...
    @property
    def token(self) -> str: ...
    @property
    def low(self) -> Array: ...
    @property
    def high(self) -> Array: ...
    @property
    def block_influence(self) -> Array: ...
    @property
    def relative_magnitude(self) -> Array: ...
    def of_size(self, n: int) -> Array: ...
    def best_block(self, n: int) -> int: ...
    @property
    def certain(self) -> bool: ...
    def certainty(self, n: int) -> Any: ...


def draw(profile: Measured, path: Path, sizes: Sequence[int] | None = None) -> None:
    """Write a picture of four parts: the paper's map, the map in true units, distance by start, and each layer.

    Args:
        sizes: block sizes n to draw as lines and to mark; by default an eighth, a quarter and a half of the layers.

    Raises:
        UsageError: the file's ending is not one of `KINDS`, or there are too many sizes.
        PlanError: there is no block of such a size.
        OutputError: the file cannot be written.
    """
    if path.suffix.lower() not in KINDS:
        raise UsageError(f"{path}: unknown kind of picture {path.suffix!r}. End the name in {', '.join(KINDS)}")
    chosen = tuple(dict.fromkeys(sizes or default_sizes(profile.layers)))
    if len(chosen) > len(COLOURS):
        raise UsageError(f"{len(chosen)} block sizes are too many for one picture: give at most {len(COLOURS)}")
    for n in chosen:
        profile.best_block(n)  # says which sizes there are, before anything is drawn
    kind = path.suffix.lower()[1:]
    with matplotlib.rc_context(_SMALL):  # also while it is rendered, since ticks get their labels only then
        picture = render(figure(profile, chosen), kind, "lmprune")
    write_bytes(path, picture)


def default_sizes(layers: int) -> tuple[int, ...]:
    """An eighth, a quarter and a half of the layers.

    >>> default_sizes(32)
    (4, 8, 16)
    """
    return tuple(sorted({max(1, round(layers * share)) for share in (0.125, 0.25, 0.5)}))


def figure(profile: Measured, sizes: Sequence[int]) -> Figure:
    """The four parts as one matplotlib figure."""
    picture = Figure(figsize=(11, 8.5), layout="constrained")
    # Rows of their own: else the second axis below would push the colour bar above away from its map.
    rows: Any = picture.subfigures(2, 1)
    maps, curves = (row.subplots(1, 2) for row in rows)
    where = f"{profile.samples} samples of {profile.source}, {profile.token} token" + "s" * (profile.token == "all")
    picture.suptitle(f"{_short(profile.model)}: {profile.layers} layers, {where}", fontsize=11)
    _map(maps[0], profile, sizes, rescaled=True)
    _map(maps[1], profile, sizes, rescaled=False)
    _curves(curves[0], profile, sizes)
    _influence(curves[1], profile, sizes)
    return picture


def blocks(profile: Measured, *, rescaled: bool) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Distances as drawn, of shape (L, L): row n-1, column l; NaN where no such block is. Rows in [0, 1] if rescaled.

    A row of equal distances is 0 throughout.
    """
    drawn = np.full((profile.layers, profile.layers), np.nan)
    for n in range(1, profile.layers + 1):
        row = profile.of_size(n)
        if rescaled:
            spread = row.max() - row.min()
            row = (row - row.min()) / (spread or 1.0)
        drawn[n - 1, : len(row)] = row
    return drawn


def block_map(profile: Measured, most: int) -> tuple[Figure, tuple[float, float, float, float]]:
    """A small map of the blocks of up to ``most`` layers, their best starts marked, and where its axes stand.

    The axes: left, top, width and height as shares of the figure.
    """
    layers, sizes = profile.layers, range(1, most + 1)
    drawn = blocks(profile, rescaled=False)[:most]
    picture = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = picture.subplots()
    edges = np.arange(layers + 1) - 0.5, np.arange(1, most + 2) - 0.5
    image = axes.pcolormesh(*edges, drawn, cmap=MAP, rasterized=layers > 40)
    axes.plot([profile.best_block(n) for n in sizes], sizes, markersize=5, markeredgewidth=0.5, **_DOTS)
    axes.set(xlabel="first layer of the block (from 0)", ylabel="layers in the block, n")
    whole_numbers(axes.xaxis, axes.yaxis)
    axes.spines[["top", "right"]].set_visible(False)
    bar = picture.colorbar(image, ax=axes)
    bar.set_label("angular distance, units of π")
    picture.draw_without_rendering()
    box = axes.get_position()
    return picture, (box.x0, 1 - box.y1, box.width, box.height)


def _map(axes: Axes, profile: Measured, sizes: Sequence[int], *, rescaled: bool) -> None:
    layers = profile.layers
    image = axes.imshow(
        blocks(profile, rescaled=rescaled),
        origin="lower",
        aspect="auto",
        cmap=MAP,
        extent=(-0.5, layers - 0.5, 0.5, layers + 0.5),
        interpolation="nearest",
    )
    best = [profile.best_block(n) for n in range(1, layers + 1)]
    axes.plot(best, range(1, layers + 1), markersize=3.5, markeredgewidth=0.4, **_DOTS)
    for n in sizes:
        axes.add_patch(Rectangle((best[n - 1] - 0.5, n - 0.5), 1, 1, fill=False, edgecolor=_CHOSEN, linewidth=1.8))
    axes.set(xlabel="first layer of the block, l (from 0)", ylabel="layers in the block, n")
    axes.set_title(
        "Angular distance, each row rescaled to [0, 1]" if rescaled else "Angular distance d(l, l+n), units of π",
        fontsize=10,
    )
    _whole_ticks(axes, layers)
    assert axes.figure is not None
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.9)
    bar.set_label("0: best start of its row" if rescaled else "0: states alike, 0.5: at right angles")
    if rescaled:
        key = "dot: best start for each n\nframe: sizes drawn below"
        axes.text(0.98, 0.97, key, transform=axes.transAxes, ha="right", va="top", fontsize=8)


def _curves(axes: Axes, profile: Measured, sizes: Sequence[int]) -> None:
    for n, colour, mark in zip(sizes, COLOURS, MARKS):
        starts = np.arange(profile.layers - n + 1)
        row = profile.of_size(n)
        low, high = np.diagonal(profile.low, n), np.diagonal(profile.high, n)
        best = profile.best_block(n)
        label = f"n = {n}: layers {spell(range(best, best + n))}"
        if profile.certain:
            label += f", {100 * profile.certainty(n).shares.get(best, 0.0):.0f} % of resamples"
            axes.fill_between(starts, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(starts, row, color=colour, marker=mark, markersize=3, linewidth=1.2, label=label)
        axes.plot(best, row[best], marker=mark, markersize=9, color=colour, markeredgecolor="black", linestyle="none")
    axes.set(xlabel="first layer of the block, l (from 0)", ylabel="angular distance, units of π")
    band = "with its 95 % bootstrap band" if profile.certain else f"of too few samples ({profile.samples}) for a band"
    axes.set_title(f"Distance by start, {band}", fontsize=10)
    axes.set_ylim(bottom=0)
    _whole_ticks(axes, profile.layers, vertical=False)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, framealpha=0.9)


def _influence(axes: Axes, profile: Measured, sizes: Sequence[int]) -> None:
    layers = np.arange(profile.layers)
    n = sizes[len(sizes) // 2]
    best = profile.best_block(n)
    inside = (layers >= best) & (layers < best + n)
    axes.bar(layers, profile.block_influence, color=np.where(inside, _CHOSEN, _PLAIN), label="block influence")
    axes.plot([], [], "s", color=_CHOSEN, label=f"in the best block of n = {n}")
    axes.set(xlabel="layer (from 0)", ylabel="block influence, 1 - E cos")
    axes.set_title("What each layer changes", fontsize=10)
    _whole_ticks(axes, profile.layers, vertical=False)
    other = axes.twinx()
    other.plot(layers, profile.relative_magnitude, color="black", marker="x", markersize=4, linewidth=0.8,
               label="relative magnitude (right)")  # fmt: skip
    other.set(ylabel="relative magnitude, |added| / |output|")
    other.set_ylim(bottom=0)
    handles = [pair for a in (axes, other) for pair in zip(*a.get_legend_handles_labels())]
    axes.legend(*zip(*handles), fontsize=8, framealpha=0.9, loc="upper right")


def _whole_ticks(axes: Axes, layers: int, *, vertical: bool = True) -> None:
    axes.set_xlim(-0.5, layers - 0.5)
    whole_numbers(axes.xaxis, *([axes.yaxis] if vertical else []), ticks=16)


def _short(model: str) -> str:
    return model if len(model) < 60 else "…/" + Path(model).name
