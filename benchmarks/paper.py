"""The paper's figures 2 and 4 (arXiv 2403.17887) from what we measured: accuracy, normalised loss, and distance maps.

    python -m benchmarks.paper FOLDER [FOLDER ...] -o docs/paper.png

A FOLDER is the run folder of `lmprune sweep`, or the one in which `benchmarks.scoreboard` keeps its rows; each becomes
a line of pictures. Accuracy and loss stand against the share of layers that are gone, as cut, repaired and healed. The
loss is divided by log V, as in the paper: 1 is a uniform guess. The map is that of the folder's ``profile.json``
(`lmprune profile MODEL -o FOLDER/profile.json`), each row from its own smallest to its largest distance.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lmprune.drawing.canvas import COLOURS, GREY, MAP, MARKS, render, whole_numbers
from lmprune.drawing.maps import blocks
from lmprune.errors import LmpruneError, RecipeError
from lmprune.evaluation.rows import results_in
from lmprune.files import write_bytes
from lmprune.models.cut import open_cut
from lmprune.profiling.distances import Profile
from lmprune.sweeping.agreed import Agreements
from lmprune.sweeping.folder import Sweep

CRITERIA = ("angular", "deepest", "one-shot", "greedy", "best")
STAGES = ("as cut", "refitted", "healed")
LINES = ("-", ":", "--")
Key = tuple[str, str]
"""A criterion and a stage."""


@dataclass
class Curves:
    """What was measured of one model: by task, and of the loss over log V, share of layers gone -> value, by key."""

    title: str
    layers: int
    whole: dict[str, float] = field(default_factory=dict)
    values: dict[str, dict[Key, dict[float, float]]] = field(default_factory=dict)
    profile: Profile | None = None

    def put(self, what: str, key: Key, gone: int, value: float) -> None:
        """Note a value; with nothing gone it is every curve's first."""
        if gone:
            self.values.setdefault(what, {}).setdefault(key, {})[gone / self.layers] = value
        else:
            self.whole[what] = value

    @property
    def tasks(self) -> list[str]:
        """All but the loss."""
        return [name for name in self.values if name != LOSS]


LOSS = "loss / log V"


def of_sweep(folder: Path) -> Curves:
    """A sweep's run folder."""
    sweep, agreed = Sweep.read(folder), Agreements.read(folder)
    cut = open_cut(sweep.model["name"])
    found = Curves(str(sweep.model["name"]), int(sweep.model["layers"]))
    for point in sweep.points:
        stage = "healed" if point.healed else "refitted" if point.repaired else "as cut"
        key, results = (point.criterion or "", stage), results_in(folder / "results" / point.name)
        for score in results.scores.values() if results is not None else ():
            if score.higher_is_better:
                found.put(score.task, key, point.n, score.value)
        if agreed is not None and point.name in agreed.points:
            loss = agreed.points[point.name].loss
            found.put(LOSS, key, point.n, loss / math.log(cut.whole_config.get_text_config().vocab_size))
    return found


def of_board(folder: Path) -> Curves:
    """A scoreboard's rows."""
    asked = json.loads((folder / "asked.json").read_text(encoding="utf-8"))
    found = Curves(asked["title"], asked["layers"])
    for row in map(json.loads, (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()):
        if row["kind"] in ("whole", "depth") and "loss" in row:
            key = (row["by"], {"cut": "as cut", "refit": "refitted"}.get(row["stage"], row["stage"]))
            for task, value in row["tasks"].items():
                found.put(task, key, row["drop"], value)
            found.put(LOSS, key, row["drop"], row["loss"] / math.log(asked["vocabulary"]))
    return found


def read(folder: Path) -> Curves:
    """Either, with its distance map.

    Raises:
        RecipeError: it is neither.
    """
    if (folder / "sweep.json").is_file():
        found = of_sweep(folder)
    elif (folder / "asked.json").is_file():
        found = of_board(folder)
    else:
        raise RecipeError(f"{folder} is no run folder of `lmprune sweep` and holds no rows of benchmarks.scoreboard")
    path = folder / "profile.json"
    found.profile = Profile.read(path) if path.is_file() else None
    return found


def drawn(every: Sequence[Curves]) -> Figure:
    """A line of pictures for each model."""
    widest = max(len(curves.tasks) for curves in every) + 2
    figure = Figure(figsize=(3.4 * widest, 3.0 * len(every) + 0.5), layout="constrained")
    panels = figure.subplots(len(every), widest, squeeze=False)
    for line, curves in zip(panels, every):
        for axes, what in zip(line, [*curves.tasks, LOSS]):
            for (criterion, stage), values in _kept(curves.values.get(what, {})):
                first = {0.0: curves.whole[what]} if what in curves.whole else {}
                spots = sorted((first | values).items())
                at = CRITERIA.index(criterion)
                style = {"color": COLOURS[at], "marker": MARKS[at], "linestyle": LINES[STAGES.index(stage)]}
                places = [(100 * share, value) for share, value in spots]
                axes.plot(*zip(*places), markersize=4, label=f"{criterion}, {stage}", **style)
            axes.set(xlabel="layers gone, %", title=what.removeprefix("lmprune_").replace("_", " "))
            axes.grid(alpha=0.25, color=GREY)
            axes.spines[["top", "right"]].set_visible(False)
            if what != LOSS:
                axes.set_ylim(0, 1.04)
        line[0].set_ylabel(curves.title.partition(",")[0])
        for axes in line[len(curves.tasks) + 1 :]:
            axes.set_visible(False)
        _map(line[-1], curves)
    seen = {label: mark for line in panels for axes in line for mark, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(seen.values(), seen.keys(), fontsize=8, frameon=False, loc="outside lower center", ncols=6)
    return figure


def _kept(curves: dict[Key, dict[float, float]]) -> Iterator[tuple[Key, dict[float, float]]]:
    for key, values in curves.items():
        if key[0] in CRITERIA and key[1] in STAGES:
            yield key, values


def _map(axes: Any, curves: Curves) -> None:
    """Figure 4's: the block of n layers from l on, each row from its best start (dark) to its worst."""
    if curves.profile is None:
        return
    layers = curves.profile.layers
    axes.set_visible(True)
    axes.imshow(
        blocks(curves.profile, rescaled=True), origin="lower", aspect="auto", cmap=MAP,
        extent=(-0.5, layers - 0.5, 0.5, layers + 0.5), interpolation="nearest",
    )  # fmt: skip
    axes.set(xlabel="first layer l", ylabel="layers n", title="distance, row by row")
    whole_numbers(axes.xaxis, axes.yaxis, ticks=6)


def table(curves: Curves) -> Iterator[str]:
    """The values behind the pictures."""
    yield f"{curves.title}: " + ", ".join(f"{name} {value:.3f}" for name, value in curves.whole.items())
    shares = sorted({share for every in curves.values.values() for values in every.values() for share in values})
    yield "| criterion | stage | measured | " + " | ".join(f"{100 * share:.0f} %" for share in shares) + " |"
    yield "|---|---|---|" + "--:|" * len(shares)
    for what, every in curves.values.items():
        for (criterion, stage), values in _kept(every):
            cells = [f"{values[share]:.3f}" if share in values else "" for share in shares]
            yield f"| {criterion} | {stage} | {what.removeprefix('lmprune_')} | {' | '.join(cells)} |"


def main(words: Sequence[str] | None = None) -> int:
    """Draw, and print what is drawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args(words)
    try:
        every = [read(folder) for folder in args.folders]
        write_bytes(args.output, render(drawn(every), args.output.suffix.removeprefix("."), "paper"))
    except LmpruneError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    for curves in every:
        print("\n".join(table(curves)), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
