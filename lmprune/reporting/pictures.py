"""A sweep's pictures: what is drawn where, and what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmprune.drawing.canvas import Picture
from lmprune.drawing.curves import Curve, Labels, Spot, amounts, ratios, scores
from lmprune.drawing.maps import block_map
from lmprune.evaluation.rows import Score
from lmprune.reporting.collect import Collected
from lmprune.reporting.words import bench_rows, score_text, task_text


def quality(run: Collected) -> list[Picture]:
    """One picture a task: its score by layers dropped, one line for each curve, with the harness's standard errors."""
    return [_scores(run, f"quality{number}", base) for number, base in enumerate(run.base.values())]


def _scores(run: Collected, name: str, base: Score) -> Picture:
    scale = 100 if base.higher_is_better and 0 <= base.value <= 1 else 1
    curves, said = [], []
    for label, points in run.curves().items():
        found = [(p, score) for p in points if (score := run.results[p.name].scores.get(base.task))]
        spots = [
            _spot(
                point.n, score, scale, f"{name}-{point.name}",
                f"{point.name}, {point.n} layers dropped: {score_text(score)}",
            )
            for point, score in found
        ]  # fmt: skip
        curves.append(Curve(label, spots, dashed=any(point.healed for point in points)))
        said.append(f"{label}: " + ", ".join(f"{score_text(score)} at {point.n}" for point, score in found))
    title = f"{task_text(base)}: {'higher is better' if base.higher_is_better else 'lower is better'}"
    labels = Labels(title, base.metric.replace("_", " ") + (", %" if scale == 100 else ""), run.layers)
    figure = scores(curves, _spot(0, base, scale), scale * base.chance, labels)
    alt = f"{title}. Unpruned: {score_text(base)}. " + "; ".join(said) + "."
    return Picture(name, title, alt, figure, _marks(curves))


def _spot(dropped: int, score: Score, scale: int, name: str = "", says: str = "") -> Spot:
    off = scale * (score.stderr or 0.0)
    return Spot(dropped, scale * score.value, off, off, name, says)


def _marks(curves: Sequence[Curve]) -> dict[str, str]:
    return {spot.name: spot.says for curve in curves for spot in curve.spots}


def speed(run: Collected) -> list[Picture]:
    """Speed against the ideal, and the size of the weights."""
    cuts = [(run.layers - row["layers"], row) for row in bench_rows(run)]
    return [_ratios(run, cuts), _weights(run, cuts)] if len(cuts) > 1 else []


def _ratios(run: Collected, cuts: Sequence[tuple[int, Mapping[str, Any]]]) -> Picture:
    curves, said = [], []
    for kind in ("decode", "prefill"):
        spots = []
        for n, row in cuts:
            median, low, high = (row[f"{kind}_ratio"][part] for part in ("median", "low", "high"))
            says = (
                f"{row['name']}, {kind}: {median:.2f} times as fast ({low:.2f} to {high:.2f}), ideal "
                f"{row['ideal']:.2f}; {row[f'{kind}_tokens_per_second']:,.0f} tokens/s"
            )
            off = max(median - low, 0), max(high - median, 0)
            spots.append(Spot(n, median, *off, f"speed-{kind}-{row['name']}", says))
        curves.append(Curve(kind, spots))
        said.append(f"{kind}: " + ", ".join(f"{spot.value:.2f} at {spot.dropped}" for spot in spots))
    row = cuts[0][1]
    title = f"Speed, prompt {row['prompt']}, batch {row['batch']}"
    ideal = [(n, row["ideal"]) for n, row in cuts]
    figure = ratios(curves, ideal, Labels(title, "times as fast", run.layers))
    alt = f"{title}. Times as fast as unpruned, by layers dropped. " + "; ".join(said)
    return Picture("speed", title, alt, figure, _marks(curves))


def _weights(run: Collected, cuts: Sequence[tuple[int, Mapping[str, Any]]]) -> Picture:
    spots = []
    for n, row in sorted(cuts, key=lambda cut: cut[0]):
        megabytes = row["weight_bytes"] / 1e6
        peak = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / 1e6:,.1f} MB"
        says = f"{row['name']}: weights {megabytes:,.1f} MB{peak}, {row['parameters']:,} parameters"
        spots.append(Spot(n, megabytes, name=f"memory-{row['name']}", says=says))
    title = "Memory of the weights"
    figure = amounts(spots, cuts[0][1]["weight_bytes"] / 1e6, Labels(title, "weights, MB", run.layers))
    alt = f"{title} by layers dropped. " + "; ".join(spot.says for spot in spots)
    return Picture("memory", title, alt, figure, _marks([Curve("", spots)]))


def distances(run: Collected) -> Picture | None:
    """The distance map: blocks of layers by start and size."""
    if run.profile is None:
        return None
    most = map_rows(run)
    figure, frame = block_map(run.profile, most)
    best = ", ".join(f"{n} layers from {run.profile.best_block(n)}" for n in range(1, most + 1))
    alt = f"Map of the angular distance over blocks of layers. Most alike at both ends: {best}."
    return Picture("map", "Distance map", alt, figure, {}, frame)


def map_rows(run: Collected) -> int:
    """How many block sizes `distances` draws."""
    return min(run.layers - 1, max((point.n for point in run.sweep.points), default=run.layers) + 2)
