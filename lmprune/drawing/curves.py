"""Pictures of a sweep, by matplotlib: the same figure as SVG for the page and as PNG for a model card.

Every mark that a reader may ask about has an id, by which the page finds it and shows its value. Colours are the
Okabe-Ito set; curves differ in their marks and strokes as well.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lmprune.evaluation.rows import Score
from lmprune.reporting.collect import Collected
from lmprune.reporting.words import bench_rows, score_text, task_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKS = ("o", "s", "^", "D", "v", "P")
_GREY = "#7f7f7f"
_SIZE = (4.0, 2.9)


@dataclass(frozen=True)
class Picture:
    """A figure for the page.

    Attributes:
        name: of its file and of its ids.
        alt: what it shows, for those who do not see it.
        marks: id of a mark -> what it says.
        frame: left, top, width and height of the axes as shares of the picture, for pointing at a map.
    """

    name: str
    title: str
    alt: str
    figure: Figure
    marks: Mapping[str, str]
    frame: tuple[float, float, float, float] | None = None

    def svg(self) -> str:
        """The picture to stand inside a page: it takes the page's colours, and its ids are its own."""
        text = _render(self.figure, "svg", self.name).decode("utf-8")
        text = text[text.index("<svg") :]
        text = re.sub(r'\sid="([^"]+)"', rf' id="{self.name}-\1"', text)
        text = re.sub(r"url\(#", f"url(#{self.name}-", text)
        text = re.sub(r'href="#', f'href="#{self.name}-', text)
        text = text.replace("#000000", "currentColor")
        for i, colour in enumerate(_COLOURS):
            text = text.replace(colour.lower(), f"var(--curve{i})")
        text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
        text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
        return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)

    def png(self) -> bytes:
        """The picture as a file."""
        return _render(self.figure, "png", self.name)


def _render(figure: Figure, kind: str, salt: str) -> bytes:
    # A fixed salt and no date: the same run gives the same file.
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none", "font.family": "sans-serif"}):
        out = io.BytesIO()
        transparent = kind == "svg"
        figure.savefig(
            out, format=kind, dpi=150, transparent=transparent, metadata={"Date": None} if transparent else {}
        )
        return out.getvalue()


def quality(run: Collected) -> list[Picture]:
    """One picture a task: its score by layers dropped, one line for each curve, with the harness's standard errors."""
    return [_curve(run, number, score) for number, score in enumerate(run.base.values())]


def _curve(run: Collected, number: int, base: Score) -> Picture:
    name, marks = f"quality{number}", {}
    figure, axes = _axes()
    scale = 100 if base.higher_is_better and 0 <= base.value <= 1 else 1
    axes.axhline(scale * base.value, color=_GREY, linewidth=1, linestyle=":")
    if base.chance:
        axes.axhline(scale * base.chance, color=_GREY, linewidth=1, linestyle=(0, (1, 4)))
        axes.text(
            1,
            scale * base.chance,
            "guessing",
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="bottom",
            fontsize=8,
        )
    said = []
    for i, (curve, points) in enumerate(run.curves().items()):
        scores = [
            (point, run.results[point.name].scores[base.task])
            for point in points
            if base.task in run.results[point.name].scores
        ]
        x = [0, *(point.n for point, _ in scores)]
        y = [base.value, *(score.value for _, score in scores)]
        error = [base.stderr or 0.0, *(score.stderr or 0.0 for _, score in scores)]
        style = _style(i, curve)
        axes.errorbar(
            x, [scale * v for v in y], yerr=[scale * e for e in error] if any(error) else None,
            linewidth=1.4, capsize=2, elinewidth=0.8, label=curve, **style | {"marker": ""},
        )  # fmt: skip
        for (point, score), value in zip(scores, y[1:]):
            marks[mark := f"{name}-{point.name}"] = f"{point.name}, {point.n} layers dropped: {score_text(score)}"
            _mark(axes, point.n, scale * value, style, mark)
        said.append(f"{curve}: " + ", ".join(f"{score_text(score)} at {point.n}" for point, score in scores))
    axes.set(ylabel=base.metric.replace("_", " ") + (", %" if scale == 100 else ""))
    _finish(run, axes)
    direction = "higher is better" if base.higher_is_better else "lower is better"
    title = f"{task_text(base)}: {direction}"
    axes.set_title(title, fontsize=10, loc="left")
    return Picture(name, title, f"{title}. Unpruned: {score_text(base)}. " + "; ".join(said) + ".", figure, marks)


def speed(run: Collected) -> list[Picture]:
    """Speed against the ideal L/(L-n), and the size of the weights."""
    rows = bench_rows(run)
    cuts = [(run.layers - row["layers"], row) for row in rows]
    if len(cuts) < 2:
        return []
    return [_ratios(run, cuts), _weights(run, cuts)]


def _ratios(run: Collected, cuts: Sequence[tuple[int, Any]]) -> Picture:
    figure, axes = _axes()
    marks, said = {}, []
    dropped = np.linspace(0, max(n for n, _ in cuts), 60)
    axes.plot(
        dropped, run.layers / (run.layers - dropped), color=_GREY, linestyle=":", linewidth=1.2, label="ideal, L/(L-n)"
    )
    for i, kind in enumerate(("decode", "prefill")):
        style = _style(i, kind)
        for n, row in cuts:
            ratio = row[f"{kind}_ratio"]
            below, above = ratio["median"] - ratio["low"], ratio["high"] - ratio["median"]
            mark = f"speed-{kind}-{row['name']}"
            axes.errorbar([n], [ratio["median"]], yerr=[[max(below, 0)], [max(above, 0)]], capsize=2, elinewidth=0.8,
                          **style | {"marker": "", "linestyle": ""})  # fmt: skip
            _mark(axes, n, ratio["median"], style, mark)
            speed = row[f"{kind}_tokens_per_second"]
            marks[mark] = (
                f"{row['name']}, {kind}: {ratio['median']:.2f} times as fast "
                f"({ratio['low']:.2f} to {ratio['high']:.2f}), ideal {row['ideal']:.2f}; {speed:,.0f} tokens/s"
            )
        axes.plot([], [], linewidth=0, label=kind, **style | {"linestyle": ""})
        said.append(f"{kind}: " + ", ".join(f"{row[f'{kind}_ratio']['median']:.2f} at {n}" for n, row in cuts))
    axes.set(ylabel="times as fast")
    axes.set_ylim(bottom=0.8)
    _finish(run, axes)
    row = cuts[0][1]
    title = f"Speed, prompt {row['prompt']}, batch {row['batch']}"
    axes.set_title(title, fontsize=10, loc="left")
    return Picture(
        "speed", title, f"{title}. Times as fast as unpruned, by layers dropped. " + "; ".join(said), figure, marks
    )


def _weights(run: Collected, cuts: Sequence[tuple[int, Any]]) -> Picture:
    figure, axes = _axes()
    marks = {}
    for n, row in sorted(cuts, key=lambda cut: cut[0]):
        mark = f"memory-{row['name']}"
        _mark(axes, n, row["weight_bytes"] / 1e6, _style(0, ""), mark)
        peak = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / 1e6:,.1f} MB"
        marks[mark] = (
            f"{row['name']}: weights {row['weight_bytes'] / 1e6:,.1f} MB{peak}, {row['parameters']:,} parameters"
        )
    whole = cuts[0][1]["weight_bytes"] / 1e6
    axes.axhline(whole, color=_GREY, linestyle=":", linewidth=1)
    axes.set(ylabel="weights, MB")
    axes.set_ylim(bottom=0)
    _finish(run, axes, legend=False)
    title = "Memory of the weights"
    axes.set_title(title, fontsize=10, loc="left")
    return Picture("memory", title, f"{title} by layers dropped. " + "; ".join(marks.values()), figure, marks)


def distances(run: Collected) -> Picture | None:
    """The distance map: every block of layers by start and size."""
    if run.profile is None:
        return None
    layers, profile = run.layers, run.profile
    most = min(layers - 1, max((point.n for point in run.sweep.points), default=layers) + 2)
    drawn = np.full((most, layers), np.nan)
    for n in range(1, most + 1):
        drawn[n - 1, : layers - n + 1] = profile.of_size(n)
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    image = axes.pcolormesh(
        np.arange(layers + 1) - 0.5, np.arange(1, most + 2) - 0.5, drawn, cmap="cividis", rasterized=layers > 40
    )
    axes.plot([profile.best_block(n) for n in range(1, most + 1)], range(1, most + 1), ".", color="white", markersize=5,
              markeredgecolor="black", markeredgewidth=0.5)  # fmt: skip
    axes.set(xlabel="first layer of the block (from 0)", ylabel="layers in the block, n")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("angular distance, units of π")
    figure.draw_without_rendering()
    box = axes.get_position()
    best = ", ".join(f"{n} layers from {profile.best_block(n)}" for n in range(1, most + 1))
    alt = f"Map of the angular distance over blocks of layers. Most alike at both ends: {best}."
    frame = (box.x0, 1 - box.y1, box.width, box.height)
    return Picture("map", "Distance map", alt, figure, {}, frame)


def map_rows(run: Collected) -> int:
    """How many block sizes `distances` draws."""
    return min(run.layers - 1, max((point.n for point in run.sweep.points), default=run.layers) + 2)


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    return figure, figure.subplots()


def _style(number: int, curve: str) -> dict[str, Any]:
    healed = curve.endswith(", healed")
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKS[number % len(_MARKS)],
        "linestyle": "--" if healed else "-",
    }


def _mark(axes: Axes, x: float, y: float, style: Mapping[str, Any], name: str) -> None:
    axes.plot([x], [y], gid=name, markersize=6, linestyle="", color=style["color"], marker=style["marker"], zorder=3)


def _finish(run: Collected, axes: Axes, *, legend: bool = True) -> None:
    axes.set(xlabel=f"layers dropped, of {run.layers}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(alpha=0.25, color=_GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    if legend:
        axes.legend(fontsize=8, framealpha=0, loc="best")
