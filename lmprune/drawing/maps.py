"""Pictures of a profile. Knows matplotlib, and nothing of models.

Layers are counted from 0. Colours: cividis for maps and the Okabe-Ito set for lines, both safe for colour-blind eyes;
lines differ in their marks as well.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmprune.cuts.plan import spell
from lmprune.errors import UsageError
from lmprune.files import write_bytes
from lmprune.profiling.distances import Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = (".png", ".svg", ".pdf")
_MAP = "cividis"
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKS = ("o", "s", "^", "D", "v", "P")
_CHOSEN = "#D55E00"
_PLAIN = "#0072B2"


def draw(profile: Profile, path: Path, sizes: Sequence[int] | None = None) -> None:
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
    if len(chosen) > len(_LINES):
        raise UsageError(f"{len(chosen)} block sizes are too many for one picture: give at most {len(_LINES)}")
    for n in chosen:
        profile.best_block(n)  # says which sizes there are, before anything is drawn
    import matplotlib

    # A fixed salt and no date: the same profile gives the same file.
    with matplotlib.rc_context({"svg.hashsalt": "lmprune", "svg.fonttype": "none", "font.size": 9}):
        picture = io.BytesIO()
        metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower(), {})
        figure(profile, chosen).savefig(picture, format=path.suffix.lower()[1:], dpi=150, metadata=metadata)
    write_bytes(path, picture.getvalue())


def default_sizes(layers: int) -> tuple[int, ...]:
    """An eighth, a quarter and a half of the layers.

    >>> default_sizes(32)
    (4, 8, 16)
    """
    return tuple(sorted({max(1, round(layers * share)) for share in (0.125, 0.25, 0.5)}))


def figure(profile: Profile, sizes: Sequence[int]) -> Figure:
    """The four parts as one matplotlib figure."""
    from matplotlib.figure import Figure

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


def blocks(profile: Profile, *, rescaled: bool) -> np.ndarray[Any, np.dtype[np.float64]]:
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


def _map(axes: Axes, profile: Profile, sizes: Sequence[int], *, rescaled: bool) -> None:
    from matplotlib.patches import Rectangle

    layers = profile.layers
    image = axes.imshow(
        blocks(profile, rescaled=rescaled),
        origin="lower",
        aspect="auto",
        cmap=_MAP,
        extent=(-0.5, layers - 0.5, 0.5, layers + 0.5),
        interpolation="nearest",
    )
    best = [profile.best_block(n) for n in range(1, layers + 1)]
    axes.plot(
        best, range(1, layers + 1), ".", color="white", markersize=3.5, markeredgecolor="black", markeredgewidth=0.4
    )
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


def _curves(axes: Axes, profile: Profile, sizes: Sequence[int]) -> None:
    for n, colour, mark in zip(sizes, _LINES, _MARKS):
        starts = np.arange(profile.layers - n + 1)
        row = profile.of_size(n)
        low, high = np.diagonal(profile.low, n), np.diagonal(profile.high, n)
        best = profile.best_block(n)
        sure = profile.certainty(n).shares.get(best, 0.0)
        label = f"n = {n}: layers {spell(range(best, best + n))}, {100 * sure:.0f} % of resamples"
        axes.fill_between(starts, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(starts, row, color=colour, marker=mark, markersize=3, linewidth=1.2, label=label)
        axes.plot(best, row[best], marker=mark, markersize=9, color=colour, markeredgecolor="black", linestyle="none")
    axes.set(xlabel="first layer of the block, l (from 0)", ylabel="angular distance, units of π")
    axes.set_title("Distance by start, with its 95 % bootstrap band", fontsize=10)
    axes.set_ylim(bottom=0)
    _whole_ticks(axes, profile.layers, vertical=False)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, framealpha=0.9)


def _influence(axes: Axes, profile: Profile, sizes: Sequence[int]) -> None:
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
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.5, layers - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
    if vertical:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))


def _short(model: str) -> str:
    return model if len(model) < 60 else "…/" + Path(model).name
