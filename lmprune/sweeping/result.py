"""What a sweep gave, as plain data. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

from lmprune.evaluation.rows import Results
from lmprune.sweeping.folder import Sweep, results_of, results_path


@dataclass(frozen=True, repr=False)
class SweepResult:
    """A run folder after a sweep.

    Attributes:
        left: names of the points that were asked for and are not measured yet.
        commands: what `--launcher print` gives instead of measuring.
    """

    folder: Path
    sweep: Sweep
    left: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the points that there are results of."""
        return tuple(point.name for point in self.sweep.points if results_path(self.folder, point).is_dir())

    def results(self) -> Mapping[str, Results]:
        """What was measured, by point, as the harness's files say it."""
        found = {point.name: results_of(self.folder, point) for point in self.sweep.points}
        return {name: results for name, results in found.items() if results is not None}

    def __repr__(self) -> str:
        measured = f"{len(self.measured)} of {len(self.sweep.points)} points measured"
        return f"<SweepResult of {self.sweep.model['name']} in {self.folder}: {measured}>"

    def _repr_html_(self) -> str:
        """One row a measured point, one column a task, for a notebook."""
        results = self.results()
        tasks = list(dict.fromkeys(task for each in results.values() for task in each.scores))
        head = "".join(f"<th>{escape(title)}</th>" for title in ("model", "layers dropped", *tasks))
        rows = []
        for point in self.sweep.points:
            if point.name in results:
                scores = results[point.name].scores
                values = [f"{scores[task].value:.4f}" if task in scores else "-" for task in tasks]
                cells = (point.name, str(point.n), *values)
                rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
        return f"<table><tr>{head}</tr>{''.join(rows)}</table>"
