"""Harness results files -> rows of numbers. Pure: reads files and needs no harness."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmprune.errors import RecipeError, shown, told_as
from lmprune.files import read_json

PREFERRED = (
    "acc",
    "exact_match",
    "loss_over_log_v",
    "bits_per_byte",
    "byte_perplexity",
    "word_perplexity",
    "pass@1",
    "f1",
)
"""Which metric stands for a task that has several; any other comes after these."""


@dataclass(frozen=True)
class Score:
    """One task's number. ``stderr`` is the harness's, where it gives one; ``chance`` is what guessing gives.

    ``documents`` are those that it was measured on, where that is known.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
    generative: bool
    chance: float = 0.0
    documents: int | None = None

    @property
    def noise(self) -> float:
        """The standard error, of a share at least that of two more right and two more wrong answers.

        The harness says 0 where all of eight documents are right; adding four makes that honest (Agresti and Coull
        1998, The American Statistician 52:119).
        """
        said = self.stderr or 0.0
        if not self.documents or not self.higher_is_better or not 0 <= self.value <= 1:
            return said
        share = (self.value * self.documents + 2) / (self.documents + 4)
        return max(said, math.sqrt(share * (1 - share) / (self.documents + 4)))

    @property
    def choice(self) -> bool:
        """Whether it is a share of questions answered by choosing."""
        return self.higher_is_better and not self.generative


@dataclass(frozen=True)
class Results:
    """One harness results file.

    Attributes:
        scores: by task, one each.
        data: what `lmprune sweep` noted of each task's documents; empty in files of other origin.
        note: all that `lmprune sweep` noted: base, point, settings, data, versions.
    """

    path: Path
    scores: Mapping[str, Score]
    data: Mapping[str, Any]
    harness: str | None
    limit: Any
    seed: Any
    raw: Mapping[str, Any]
    note: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a ``results_*.json``.

        Raises:
            RecipeError: it is not one.
        """
        remedy = "Remove its folder and run the sweep again"
        raw = read_json(path, RecipeError, remedy)
        if not isinstance(raw, dict) or not isinstance(raw.get("results"), dict) or "configs" not in raw:
            raise RecipeError(f"{path} is not a results file of lm_eval. Remove it, or give another folder")
        for key in _MAPPINGS:
            _check_mapping(raw, key, str(path))
        note = raw.get("lmprune", {})
        for key in ("base", "point", "data") if note else ():
            note.setdefault(key, {})
            _check_mapping(note, key, f"{path}: lmprune")
        for task in note.get("data", ()):
            _check_mapping(note["data"], task, f"{path}: lmprune.data")
        config = raw.get("config", {})
        with told_as(RecipeError, f"{path} is not a results file of lm_eval. {remedy}"):
            return cls(
                path=path,
                scores=scores_of(raw),
                data=note.get("data", {}),
                harness=_short(raw.get("lm_eval_version")),
                limit=_short(config.get("limit")),
                seed=_short(config.get("random_seed")),
                raw=raw,
                note=note,
            )


_MAPPINGS = ("n-samples", "configs", "config", "group_subtasks", "higher_is_better", "lmprune")


def _check_mapping(data: Mapping[str, Any], key: str, where: str) -> None:
    if not isinstance(data.get(key, {}), dict):
        raise RecipeError(f"{where}: {shown(key)} is {shown(data[key])} and no mapping. Run the sweep again")


def _short(value: Any) -> Any:
    """A value that messages show and that is compared."""
    if isinstance(value, (str, int, float)) and len(shown(value)) > 60:
        raise ValueError(f"{shown(value)} is no version, limit or seed")
    return value if isinstance(value, (str, int, float)) else None


def results_in(folder: Path) -> Results | None:
    """The newest results file in a point's folder; None where the folder does not exist."""
    files = sorted(folder.glob("results_*.json"))
    if files:
        return Results.read(files[-1])
    if folder.is_dir():
        raise RecipeError(f"{folder} holds no results_*.json. Remove it and run the sweep again")
    return None


def scores_of(raw: Mapping[str, Any]) -> dict[str, Score]:
    """One score for each task, and one for each group instead of its members where the group has its own."""
    found: dict[str, Score] = {}
    grouped = {
        member
        for group, members in raw.get("group_subtasks", {}).items()
        if _metrics(raw["results"].get(group, {}))
        for member in members
    }
    for task, values in raw["results"].items():
        metrics = _metrics(values)
        if not metrics or task in _all_below(grouped, raw.get("group_subtasks", {})):
            continue
        name = min(metrics, key=lambda metric: _rank(metric.split(",")[0]))
        metric, _, chosen = name.partition(",")
        stderr = values.get(f"{metric}_stderr,{chosen}")
        config = _config(raw, task)
        found[task] = Score(
            task=task,
            metric=metric,
            value=float(values[name]),
            stderr=float(stderr) if _is_number(stderr) else None,
            higher_is_better=bool(raw.get("higher_is_better", {}).get(task, {}).get(metric, True)),
            generative=config.get("output_type") == "generate_until",
            chance=_chance_of(raw, task),
            documents=_documents(raw, task),
        )
    return found


def _metrics(values: Mapping[str, Any]) -> list[str]:
    return [name for name, value in values.items() if "," in name and "_stderr," not in name and _is_number(value)]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def _rank(metric: str) -> int:
    return PREFERRED.index(metric) if metric in PREFERRED else len(PREFERRED)


def _all_below(names: set[str], tree: Mapping[str, list[str]]) -> set[str]:
    below = set(names)
    for name in names:
        below |= _all_below(set(tree.get(name, ())), tree)
    return below


def _config(raw: Mapping[str, Any], task: str) -> Mapping[str, Any]:
    """The task's configuration; of a group, that of its first member that has one."""
    configs: Mapping[str, Any] = raw["configs"]
    seen: set[str] = set()
    while task not in configs:
        members = raw.get("group_subtasks", {}).get(task)
        if not members or task in seen:
            return {}
        seen.add(task)
        task = members[0]
    found: Mapping[str, Any] = configs[task]
    return found


def _documents(raw: Mapping[str, Any], task: str) -> int | None:
    """How many a task, or the members of a group, were asked."""
    counts = raw.get("n-samples", {})
    below = {task, *_all_below({task}, raw.get("group_subtasks", {}))}
    return sum(counts[name]["effective"] for name in below if name in counts) or None


def _chance_of(raw: Mapping[str, Any], task: str) -> float:
    """What guessing gives: as the sweep counted it over the documents, else what the task's configuration tells."""
    data: Mapping[str, Any] = raw.get("lmprune", {}).get("data", {})
    below = {task, *_all_below({task}, raw.get("group_subtasks", {}))}
    counted = [note for name in sorted(below) if "chance" in (note := data.get(name, {}))]
    documents = sum(note["documents"] for note in counted)
    if documents:
        return float(sum(note["chance"] * note["documents"] for note in counted) / documents)
    return _chance(_config(raw, task))


def _chance(config: Mapping[str, Any]) -> float:
    """One over the number of choices that a configuration lists; over four where it lists none."""
    if config.get("output_type") != "multiple_choice":
        return 0.0
    choices = config.get("doc_to_choice")
    count = len(choices) if isinstance(choices, (list, dict)) else _listed(str(choices))
    return 1 / count if count else 0.25


_LONGEST_TEMPLATE = 5000


def _listed(text: str) -> int:
    """The length of the list that a template such as ``{{[sol1, sol2]}}``, or a function's source, gives; 0 if unclear.

    >>> _listed("{{[sol1, sol2]}}"), _listed("{{choices.text}}")
    (2, 0)
    """
    if len(text) > _LONGEST_TEMPLATE:  # nesting makes Python's parser slow, or kills it
        return 0
    try:
        body = ast.parse(text.strip().removeprefix("{{").removesuffix("}}").strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0
    if len(body) != 1:
        return 0
    returned = [part.value for part in ast.walk(body[0]) if isinstance(part, (ast.Expr, ast.Return))]
    if len(returned) != 1 or not isinstance(found := returned[0], ast.List):
        return 0
    return 0 if any(isinstance(element, ast.Starred) for element in found.elts) else len(found.elts)
