"""A sweep's pictures: what is drawn where, and what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmprune.drawing.canvas import Picture
from lmprune.drawing.curves import Curve, Labels, Spot, against, amounts, ratios, scores
from lmprune.drawing.maps import block_map
from lmprune.errors import sized
from lmprune.evaluation.gate import Share
from lmprune.evaluation.rows import Score
from lmprune.reporting.collect import Collected
from lmprune.reporting.words import bench_rows, score_text, task_text
from lmprune.sweeping.points import BASELINE


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
        curves.append(Curve(label, spots, dashed=any(point.made for point in points)))
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
    """Speed against the ideal, the size of the weights, and what is left of quality at each speed."""
    if len(bench_rows(run)) < 2:
        return []
    return [
        *(_ratios(run, kind) for kind in ("decode", "prefill")),
        _weights(run),
        *(_against(run, what) for what in ("knowledge", "reasoning") if _left(run, BASELINE, what)),
    ]


def _by_curve(run: Collected) -> dict[str, list[tuple[int, Mapping[str, Any]]]]:
    """(layers dropped, row of the speed table) of each criterion's cuts."""
    found: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for row in bench_rows(run):
        name = row["name"]
        curve = (
            "unpruned" if name == BASELINE else next((p.criterion for p in run.sweep.points if p.name == name), None)
        )
        found.setdefault(str(curve or name), []).append((run.layers - row["layers"], row))
    return {curve: sorted(rows, key=lambda entry: entry[0]) for curve, rows in found.items()}


def _ratios(run: Collected, kind: str) -> Picture:
    curves, said = [], []
    for label, cuts in _by_curve(run).items():
        spots = []
        for n, row in cuts:
            median, low, high = (row[f"{kind}_ratio"][part] for part in ("median", "low", "high"))
            says = (
                f"{row['name']}, {kind}: {median:.2f} times as fast ({low:.2f} to {high:.2f}), ideal "
                f"{row['ideal']:.2f}; {row[f'{kind}_tokens_per_second']:,.0f} tokens/s"
            )
            off = max(median - low, 0), max(high - median, 0)
            spots.append(Spot(n, median, *off, f"speed-{kind}-{row['name']}", says))
        curves.append(Curve(label, spots))
        said.append(f"{label}: " + ", ".join(f"{spot.value:.2f} at {spot.dropped}" for spot in spots))
    row = bench_rows(run)[0]
    title = (
        f"Speed of {'decoding' if kind == 'decode' else 'reading'}, prompt {row['prompt']}, batch {row['batch_size']}"
    )
    ideal = sorted({(n, float(row["ideal"])) for cuts in _by_curve(run).values() for n, row in cuts})
    figure = ratios(curves, ideal, Labels(title, "times as fast", run.layers))
    alt = f"{title}. Times as fast as unpruned, by layers dropped. " + "; ".join(said)
    return Picture(f"speed-{kind}", title, alt, figure, _marks(curves))


def _weights(run: Collected) -> Picture:
    curves = []
    for label, cuts in _by_curve(run).items():
        spots = []
        for n, row in cuts:
            megabytes = row["weight_bytes"] / 1e6
            peak = "" if row["peak_bytes"] is None else f", peak {sized(row['peak_bytes'])}"
            says = f"{row['name']}: weights {sized(row['weight_bytes'])}{peak}, {row['parameters']:,} parameters"
            spots.append(Spot(n, megabytes, name=f"memory-{row['name']}", says=says))
        curves.append(Curve(label, spots))
    title = "Memory of the weights"
    figure = amounts(curves, bench_rows(run)[0]["weight_bytes"] / 1e6, Labels(title, "weights, MB", run.layers))
    alt = f"{title} by layers dropped. " + "; ".join(spot.says for curve in curves for spot in curve.spots)
    return Picture("memory", title, alt, figure, _marks(curves))


def _against(run: Collected, what: str) -> Picture:
    """What is left of knowledge, or of reasoning, by how fast the model decodes."""
    curves = []
    for label, cuts in _by_curve(run).items():
        spots = []
        for _, row in cuts:
            share, times = _left(run, row["name"], what), row["decode_ratio"]["median"]
            if share is not None:
                off = 100 * share.error
                says = f"{row['name']}: {times:.2f} times as fast, keeps {share} of its {what}"
                spots.append(Spot(times, 100 * share.value, off, off, f"{what}-{row['name']}", says))
        if spots:
            curves.append(Curve(label, spots))
    title = f"{what.capitalize()} against speed"
    figure = against(curves, Labels(title, f"{what} left, %", run.layers), "times as fast (decoding)")
    alt = f"{title}. " + "; ".join(spot.says for curve in curves for spot in curve.spots)
    return Picture(f"against-{what}", title, alt, figure, _marks(curves))


def _left(run: Collected, name: str, what: str) -> Share | None:
    if name not in run.results:
        return None
    share: Share | None = getattr(run.verdict(run.point(name)), what)
    return share


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
