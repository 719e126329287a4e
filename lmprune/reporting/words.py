"""Tables and sentences of a report, as plain data and as Markdown. Pure."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import Any

from lmprune.cuts.recipe import Recipe
from lmprune.evaluation.gate import SURE, Share
from lmprune.evaluation.rows import Score
from lmprune.files import as_path
from lmprune.reporting.collect import Collected
from lmprune.sweeping.folder import recipe_path
from lmprune.sweeping.points import BASELINE, Point


def score_text(score: Score | None) -> str:
    """``0.81 ± 0.02``; shares in per cent."""
    if score is None:
        return "-"
    if score.higher_is_better and 0 <= score.value <= 1:
        error = f" ± {100 * score.stderr:.1f}" if score.stderr is not None else ""
        return f"{100 * score.value:.1f}{error} %"
    error = f" ± {score.stderr:.3f}" if score.stderr is not None else ""
    return f"{score.value:.3f}{error}"


def table(run: Collected) -> tuple[list[str], list[list[str]]]:
    """Head and rows: one row a measured point, one column a task, and what the gate makes of it."""
    ordered = [run.point(BASELINE), *(point for points in run.curves().values() for point in points)]
    head, rows = _scored(run, ordered)
    for row, point in zip(rows, ordered):
        row.insert(1, point.what)
    return [head[0], "layers dropped", *head[1:]], rows


def _scored(run: Collected, points: list[Point]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: name, loss and agreement where they were measured, one column a task, and the gate's."""
    tasks, agreed = list(run.base), [run.agreed(point) for point in points]
    more = ["loss", "says the same"] if any(agreed) else []
    head = ["model", *more, *(task_text(run.base[task]) for task in tasks), "knowledge left", "reasoning left"]
    rows = []
    for point, said in zip(points, agreed):
        scores, verdict = run.results[point.name].scores, run.verdict(point)
        shares = [_share(verdict.knowledge), _share(verdict.reasoning) + (" ⚠" if verdict.warns else "")]
        cells = [said.loss_text, said.same_text if point.made or point.is_cut else "all"] if said else ["-", "-"]
        rows.append([point.name, *cells[: len(more)], *(score_text(scores.get(task)) for task in tasks), *shares])
    return head, rows


def quantizations_table(run: Collected) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the base and its cuts, each as it is and in few bits; no rows where none were asked for."""
    points = run.few_bits()
    if not points:
        return [], []
    head, rows = _scored(run, points)
    speeds = {row["name"]: row for row in every_bench_row(run)}
    for row, point in zip(rows, points):
        speed = speeds.get(point.name)
        row[1:1] = [
            point.quantization or str(run.sweep.model.get("dtype", "own")),
            "-" if speed is None else f"{speed['weight_bytes'] / 1e6:,.1f}",
        ]
        row.append("-" if speed is None else f"{speed['decode_tokens_per_second']:,.1f}")
    return [head[0], "quantization", "weights, MB", *head[1:], "decode tokens/s"], rows


def agreement_text(run: Collected) -> str:
    """What "loss" and "says the same" mean in a table; nothing where neither was measured."""
    found = run.agreements
    if found is None:
        return ""
    return (
        f"loss: nats a token; says the same: the share of next tokens on which the likeliest is the base's own; "
        f"both on {found.tokens:,} tokens of {published(run, found.source)}, ± a standard error."
    )


def task_text(score: Score) -> str:
    """A task's name without our prefix, with its metric."""
    return f"{score.task.removeprefix('lmprune_').replace('_', ' ')} ({score.metric.replace('_', ' ')})"


def _share(share: Share | None) -> str:
    return "-" if share is None else str(share)


def in_markdown(text: str) -> str:
    """``text`` on one line, in which Markdown and HTML find nothing to obey.

    >>> in_markdown("<b>[x](y)|*z*")
    '&lt;b&gt;\\\\[x\\\\](y)\\\\|\\\\*z\\\\*'
    """
    return escape(re.sub(r"([\\`*_\[\]|#~])", r"\\\1", " ".join(text.split())), quote=False)


def fenced(text: str, language: str) -> str:
    """``text`` as a block of code in Markdown, within more backticks than it holds itself."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [[in_markdown(cell) for cell in line] for line in (head, *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], ["---"] * len(head), *lines[1:]))


def published(run: Collected, text: str) -> str:
    """``text`` without the places of folders on this machine, which are no business of whoever reads a page."""
    places = {str(run.sweep.model["name"]), str(run.folder.resolve())}
    if run.profile is not None:
        places.add(run.profile.source)
    # Anything that begins at the root, or at home, up to where it ends in a recipe or a sentence; user/name does not.
    found = re.findall(r"(?<!\w)(?:/|~/|[A-Za-z]:\\\\)[^\s'\"<>,:]*[^\s'\"<>,:.]", text)
    for place in sorted({*found, *places}, key=len, reverse=True):
        if as_path(place).is_absolute():
            text = text.replace(place, Path(place).name or "/")
    return text


def strip(point: Point) -> str:
    """Kept and dropped layers, one sign each.

    >>> strip(Point("angular-02", "angular", 6, (2, 3)))
    '■■□□■■'
    """
    return "".join("□" if layer in point.dropped else "■" for layer in range(point.layers))


def gate_text(run: Collected) -> str:
    """The gate's thresholds in one sentence."""
    return (
        f"Knowledge holds from {100 * run.gate.holds:.0f} % of the unpruned model's score above chance; reasoning has "
        f"fallen below {100 * run.gate.falls:.0f} % of it. ± is a standard error: within {SURE} of it there is no "
        "verdict."
    )


def summary(run: Collected) -> list[str]:
    """What a person should know after ten seconds."""
    best = run.recommended()
    lines = []
    if best is not None:
        lines.append(run.verdict(best).sentence(run.describe(best), "the largest cut here that keeps both"))
    elif cuts := run.cuts():
        unclear = [point for point in cuts if not run.rejects(point)]
        if unclear:
            # The largest of which nothing is known but noise, or nothing at all.
            point = max(unclear, key=lambda point: point.n)
            lines.append(run.verdict(point).sentence(run.describe(point)))
        else:
            lines.append("No cut here keeps both knowledge and reasoning.")
    lines += run.warnings()
    if run.missing:
        lines.append(f"{len(run.missing)} of {len(run.sweep.points)} points are not measured yet.")
    return lines


def bench_rows(run: Collected) -> list[dict[str, Any]]:
    """Rows of the speed table at the smallest batch and prompt, of models in the first one's type."""
    rows = every_bench_row(run)
    return [row for row in rows if row["quantization"] == rows[0]["quantization"]]


def every_bench_row(run: Collected) -> list[dict[str, Any]]:
    """The same of models in every type."""
    if run.bench is None or not run.bench["rows"]:
        return []
    first = run.bench["rows"][0]
    return [
        row for row in run.bench["rows"] if (row["prompt"], row["batch_size"]) == (first["prompt"], first["batch_size"])
    ]


def reason(run: Collected, point: Point) -> str:
    """Why these layers, as their recipe says: one line."""
    path = recipe_path(run.folder, point)
    said = Recipe.read(path).choice.get("summary") if path.is_file() else None
    return str(said or f"chosen by the criterion {point.criterion}")
