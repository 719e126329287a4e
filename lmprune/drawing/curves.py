"""Pictures of many cuts: something measured, by layers dropped. Every spot has an id, by which a page finds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, FuncFormatter

from lmprune.drawing.canvas import COLOURS, GREY, MARKS, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (4.0, 3.2)
_LEGEND = 90
"""Letters of a legend's line, six of which a mark takes."""
_BARS: dict[str, Any] = {"capsize": 2, "elinewidth": 0.8}


@dataclass(frozen=True)
class Spot:
    """A measured value: the layers dropped, the value, how far it may be off to both sides, its id, what it says."""

    dropped: float
    value: float
    below: float = 0.0
    above: float = 0.0
    name: str = ""
    says: str = ""


@dataclass(frozen=True)
class Curve:
    """Spots that belong together."""

    label: str
    spots: Sequence[Spot]
    dashed: bool = False


@dataclass(frozen=True)
class Labels:
    """What stands around a picture; ``layers`` are those of the unpruned model."""

    title: str
    value: str
    layers: int


def scores(curves: Sequence[Curve], whole: Spot, chance: float, labels: Labels) -> Figure:
    """One line for each curve, all from the unpruned model on, with its level and that of guessing, if above 0."""
    figure, axes = _axes()
    axes.axhline(whole.value, color=GREY, linewidth=1, linestyle=":")
    if chance:
        axes.axhline(chance, color=GREY, linewidth=1, linestyle=(0, (1, 4)))
        where = axes.get_yaxis_transform()
        axes.text(1, chance, "guessing", transform=where, ha="right", va="bottom", fontsize=8)
    for i, curve in enumerate(curves):
        style, spots = _style(i, dashed=curve.dashed), [whole, *curve.spots]
        x, y = [spot.dropped for spot in spots], [spot.value for spot in spots]
        axes.errorbar(x, y, _off(spots), linewidth=1.4, label=curve.label, **_BARS, **style | {"marker": ""})
        for spot in curve.spots:
            _mark(axes, spot, style)
    return _finish(figure, axes, labels)


def ratios(curves: Sequence[Curve], ideal: Sequence[tuple[int, float]], labels: Labels) -> Figure:
    """Spots beside the ideal, (layers dropped, times as fast)."""
    figure, axes = _axes()
    limits = sorted({(0, 1.0), *ideal})
    axes.plot(*zip(*limits), color=GREY, linestyle=":", linewidth=1.2, label="ideal, by weights")
    _scattered(axes, curves)
    return _finish(figure, axes, labels)


def amounts(curves: Sequence[Curve], whole: float, labels: Labels) -> Figure:
    """Spots from 0 up, and the level of the unpruned model."""
    figure, axes = _axes()
    _scattered(axes, curves)
    axes.axhline(whole, color=GREY, linestyle=":", linewidth=1)
    axes.set_ylim(0, 1.05 * max(whole, axes.get_ylim()[1]))
    return _finish(figure, axes, labels)


def against(curves: Sequence[Curve], labels: Labels, across: str) -> Figure:
    """Spots whose place across is another measured value, such as speed."""
    figure, axes = _axes()
    _scattered(axes, curves, apart=0.0)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    _finish(figure, axes, labels)
    axes.xaxis.set_major_locator(AutoLocator())
    axes.set_xlabel(across)
    return figure


def _scattered(axes: Axes, curves: Sequence[Curve], apart: float = 0.12) -> None:
    """Spots with their error bars, one look for each curve, moved ``apart`` so that none lies on another's."""
    for i, curve in enumerate(curves):
        style, move = _style(i), apart * (i - (len(curves) - 1) / 2)
        for spot in curve.spots:
            moved = replace(spot, dropped=spot.dropped + move)
            if spot.below or spot.above:
                bare = style | {"marker": "", "linestyle": ""}
                axes.errorbar([moved.dropped], [spot.value], yerr=[[spot.below], [spot.above]], **_BARS, **bare)
            _mark(axes, moved, style)
        axes.plot([], [], linewidth=0, label=curve.label, **style | {"linestyle": ""})


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    return figure, figure.subplots()


def _style(number: int, *, dashed: bool = False) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKS[number % len(MARKS)],
        "linestyle": "--" if dashed else "-",
    }


def _off(spots: Sequence[Spot]) -> list[list[float]] | None:
    """Error bars, where any spot has one."""
    off = [[spot.below for spot in spots], [spot.above for spot in spots]]
    return off if any(map(any, off)) else None


def _mark(axes: Axes, spot: Spot, style: dict[str, Any]) -> None:
    look = {"color": style["color"], "marker": style["marker"]}
    axes.plot([spot.dropped], [spot.value], gid=spot.name, markersize=6, linestyle="", zorder=3, clip_on=False, **look)


def _finish(figure: Figure, axes: Axes, labels: Labels, *, legend: bool = True) -> Figure:
    axes.set(xlabel=f"layers dropped, of {labels.layers}", ylabel=labels.value)
    axes.set_title(labels.title, fontsize=10, loc="left")
    whole_numbers(axes.xaxis)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(alpha=0.25, color=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    if legend:
        # Below, where it covers nothing.
        found = axes.get_legend_handles_labels()[1]
        beside = max(1, min(len(found), _LEGEND // (max(map(len, found), default=0) + 6)))
        figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=beside)
    return figure
