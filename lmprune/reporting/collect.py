"""All that a sweep's folder holds, read once and checked against one another. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

from lmprune.benching.rows import Bench
from lmprune.cuts.lineage import LINEAGE, Lineage
from lmprune.cuts.plan import Plan
from lmprune.errors import RecipeError, line_of, shown
from lmprune.evaluation.gate import Gate, Verdict
from lmprune.evaluation.rows import Results, Score
from lmprune.files import parse_json, read_json, read_text
from lmprune.profiling.distances import Profile
from lmprune.sweeping.agreed import Agreed, Agreements
from lmprune.sweeping.folder import Sweep, check_inside, made_path, recipe_path, results_of, results_path
from lmprune.sweeping.points import BASELINE, Point

SAMPLES_SHOWN = 3
LONGEST_LINE = 1 << 26
"""Bytes of one sample."""


@dataclass(frozen=True)
class Collected:
    """A sweep with its results.

    Attributes:
        results: by point; points that are not measured yet are absent.
        bench: what `lmprune bench` wrote; None without.
        agreements: how often points say what the base says; None without.
        problems: why these numbers should not stand in one curve; empty where they may.
    """

    folder: Path
    sweep: Sweep
    results: Mapping[str, Results]
    profile: Profile | None
    bench: Mapping[str, Any] | None
    agreements: Agreements | None
    problems: tuple[str, ...]
    gate: Gate

    @classmethod
    def read(cls, folder: Path, gate: Gate | None = None) -> Collected:
        """Read a run folder.

        Raises:
            RecipeError: it is no run folder, holds foreign or broken files, or lacks the baseline.
        """
        sweep = Sweep.read(folder)
        parts = ("*.json", "recipes/*.yml", "results/*", "results/*/*")
        for path in (path for part in parts for path in folder.glob(part)):
            check_inside(folder, path)
        results = {p.name: found for p in sweep.points if (found := results_of(folder, p)) is not None}
        if BASELINE not in results:
            raise RecipeError(
                f"{folder} has no results of the unpruned model yet. Run the same `lmprune sweep` to go on"
            )
        known = {point.name for point in sweep.points}
        strange = [entry.name for entry in sorted((folder / "results").iterdir()) if entry.name not in known]
        if strange := [name for name in strange if not name.startswith(".")]:
            raise RecipeError(
                f"{folder / 'results'}: {shown(strange[0])} belongs to no point of this sweep. Move it elsewhere"
            )
        path = folder / "profile.json"
        return cls(
            folder=folder,
            sweep=sweep,
            results=results,
            profile=Profile.read(path) if path.is_file() else None,
            bench=_bench(folder / "bench.json"),
            agreements=Agreements.read(folder),
            problems=tuple(line_of(ValueError(problem)) for problem in _problems(sweep, results)),
            gate=gate or Gate(),
        )

    def alike(self) -> Collected:
        """The same, if its numbers may stand in one curve.

        Raises:
            RecipeError: they may not.
        """
        if self.problems:
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            raise RecipeError(
                f"{self.folder}: these results do not belong in one curve: {self.problems[0]}{more}. "
                "Measure those points again in a new folder"
            )
        return self

    @property
    def missing(self) -> list[Point]:
        """Points without results, or without a task's."""
        every = {*self.base}
        return [
            point
            for point in self.sweep.points
            if point.name not in self.results or every - {*self.results[point.name].scores}
        ]

    @property
    def layers(self) -> int:
        """Layers of the base."""
        return int(self.sweep.model["layers"])

    @property
    def base(self) -> Mapping[str, Score]:
        """The unpruned model's scores by task."""
        return self.results[BASELINE].scores

    def point(self, name: str) -> Point:
        """The point of that name."""
        return next(point for point in self.sweep.points if point.name == name)

    def curves(self) -> dict[str, list[Point]]:
        """Measured points by curve, by layers dropped: ``angular``, ``angular, repaired`` and so on.

        Those in few bits are in `few_bits`.
        """
        found: dict[str, list[Point]] = {}
        for point in sorted(self.sweep.points, key=lambda point: (point.stage, point.n)):
            if point.criterion and not point.quantization and point.name in self.results:
                found.setdefault(point.criterion + (f", {point.made}" if point.made else ""), []).append(point)
        return found

    def few_bits(self) -> list[Point]:
        """Where few bits were asked for: the base and each cut as it is and in these, as far as measured."""
        names = {point.unhealed for point in self.sweep.points if point.quantization and point.name in self.results}
        found = [
            point
            for point in self.sweep.points
            if point.unhealed in names and not point.folder and point.name in self.results
        ]
        return sorted(found, key=lambda point: (point.n, point.criterion or "", point.stage))

    def agreed(self, point: Point) -> Agreed | None:
        """How often a point says what the base says, where that was measured."""
        return self.agreements.points.get(point.name) if self.agreements is not None else None

    def verdict(self, point: Point) -> Verdict:
        """What the gate says of a measured point."""
        return self.gate.judge(self.base, self.results[point.name].scores)

    def warnings(self) -> list[str]:
        """The gate's sentences on all cuts that keep knowledge and lose reasoning."""
        cuts = self.cuts()
        return [self.verdict(point).sentence(self.describe(point)) for point in cuts if self.verdict(point).warns]

    def cuts(self) -> list[Point]:
        """Measured cuts, each once: what two criteria chose alike is one model."""
        found: dict[tuple[Plan | None, str], Point] = {}
        for points in self.curves().values():
            for point in points:
                found.setdefault((point.plan, point.made), point)
        return list(found.values())

    def describe(self, point: Point) -> str:
        """A point as the subject of a sentence."""
        healed = {"": "", "repaired": ", then repair,", "healed": ", then healing,"}[point.made]
        chosen = [
            each.criterion
            for points in self.curves().values()
            for each in points
            if (each.plan, each.made) == (point.plan, point.made)
        ]
        if point.parts:
            return f"A cut that {point.plan.describe() if point.plan else ''}{healed}"
        return f"Dropping {point.n} of {point.layers} layers ({' and '.join(map(str, chosen))}){healed}"

    def recommended(self) -> Point | None:
        """The largest cut that keeps both knowledge and reasoning; of equals, the better at reasoning."""
        fit = []
        for point in self.cuts():
            verdict = self.verdict(point)
            if verdict.holds and verdict.reasoning is not None:
                fit.append((point.n, verdict.reasoning.value, point))
        return max(fit, key=lambda entry: entry[:2])[2] if fit else None

    def rejects(self, point: Point) -> bool:
        """Whether a cut is known to lose knowledge or reasoning; of a model that only guesses nothing is known."""
        return self.verdict(point).holds is False

    def recipe(self, point: Point) -> str | None:
        """The text of a cut's recipe."""
        path = recipe_path(self.folder, point)
        return read_text(path, RecipeError, "Run the sweep again in a new folder") if path.is_file() else None

    def healings(self) -> dict[str, Mapping[str, Any]]:
        """What the checkpoints of measured points say of their repair or healing, by name, as far as they are there.

        Raises:
            ModelError: a checkpoint's history cannot be read.
            RecipeError: it is reached by a link out of the run folder.
        """
        found = {}
        for point in (point for points in self.curves().values() for point in points if point.folder):
            folder = made_path(self.folder, point)
            check_inside(self.folder, folder / LINEAGE)
            told = Lineage.read(folder, remedy="Remove its folder and run the sweep again")
            if told is not None and told.healing:
                found[point.name] = told.healing
        return found

    def samples(self) -> list[dict[str, Any]]:
        """Some generated texts: task, prompt, target, and each point's text by name."""
        shown: list[dict[str, Any]] = []
        for task in (score.task for score in self.base.values() if score.generative):
            by_point = {
                name: dict(_samples(results_path(self.folder, self.point(name)), task)) for name in self.results
            }
            for number in list(by_point[BASELINE])[:SAMPLES_SHOWN]:
                first = by_point[BASELINE][number]
                shown.append(
                    {
                        "task": task,
                        "prompt": first["prompt"],
                        "target": first["target"],
                        "texts": {name: texts[number] for name, texts in by_point.items() if number in texts},
                    }
                )
        return shown


def _samples(folder: Path, task: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Document number -> text, whether it counts as right, and the prompt's end."""
    files = sorted(folder.glob(f"samples_{escape(task)}_*.jsonl"))
    if not files:
        return
    with files[-1].open("rb") as file:
        for row, line in enumerate(iter(partial(file.readline, LONGEST_LINE), b""), 1):
            try:
                entry = parse_json(line)
                if entry["doc_id"] >= SAMPLES_SHOWN:
                    return
                metric = next((name for name in entry["metrics"] if isinstance(entry.get(name), (int, float))), None)
                shown = {
                    "text": _innermost(entry["resps"]),
                    "right": bool(entry[metric]) if metric else None,
                    "prompt": entry["arguments"]["gen_args_0"]["arg_0"][-600:],
                    "target": entry["target"],
                }
            except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as exc:
                remedy = "Remove its folder and run the sweep again"
                raise RecipeError(
                    f"{files[-1]}, row {row}, is no sample of lm_eval: {line_of(exc, 80)}. {remedy}"
                ) from exc
            yield entry["doc_id"], shown


def _innermost(value: Any) -> str:
    while isinstance(value, list) and value:
        value = value[0]
    return str(value)


def _bench(path: Path) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    data = read_json(path, RecipeError, "Remove it and run the sweep again")
    return Bench.from_data(data, str(path)).to_data()


def _problems(sweep: Sweep, results: Mapping[str, Results]) -> Iterator[str]:
    """Differences from the baseline in what the numbers depend on."""
    first = results[BASELINE]
    for name, result in results.items():
        if result.harness != first.harness:
            yield f"{name} was measured by lm_eval {result.harness}, {BASELINE} by {first.harness}"
        for what in ("limit", "seed"):
            if getattr(result, what) != getattr(first, what):
                yield f"{name} was measured with {what} {getattr(result, what)}, {BASELINE} with {getattr(first, what)}"
        if not result.data:
            yield f"{name} does not say which data it was measured on: it was not made by `lmprune sweep`"
        for task in sorted({*first.data} & {*result.data}):  # the others are not measured there yet
            ours, theirs = first.data[task], result.data[task]
            if ours != theirs:
                what = next((key for key in ours if ours.get(key) != theirs.get(key)), "documents")
                yield f"{name} was measured on another {what} of {task} than {BASELINE}"
        if result.note and result.note["base"].get("fingerprint") != sweep.model.get("fingerprint"):
            yield f"{name} is a cut of another model"
        if result.note and result.note["point"].get("dropped") != list(_dropped(sweep, name)):
            yield f"{name} was measured with other layers dropped"


def _dropped(sweep: Sweep, name: str) -> tuple[int, ...]:
    return next(point.dropped for point in sweep.points if point.name == name)
