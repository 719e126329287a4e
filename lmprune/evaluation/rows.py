"""Harness results files -> rows of numbers. Pure: reads files and needs no harness."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmprune.errors import RecipeError

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
    """One task's number. ``stderr`` is the harness's, where it gives one; ``chance`` is what guessing gives."""

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
    generative: bool
    chance: float = 0.0

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
    """

    path: Path
    scores: Mapping[str, Score]
    data: Mapping[str, Any]
    harness: str | None
    limit: Any
    seed: Any
    raw: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a ``results_*.json``.

        Raises:
            RecipeError: it is not one.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as exc:
            raise RecipeError(f"cannot read {path}: {exc}. Remove its folder and run the sweep again") from exc
        if not isinstance(raw, dict) or not isinstance(raw.get("results"), dict) or "configs" not in raw:
            raise RecipeError(f"{path} is not a results file of lm_eval. Remove it, or give another folder")
        config = raw.get("config", {})
        return cls(
            path=path,
            scores=_scores(raw),
            data=raw.get("lmprune", {}).get("data", {}),
            harness=raw.get("lm_eval_version"),
            limit=config.get("limit"),
            seed=config.get("random_seed"),
            raw=raw,
        )


def results_in(folder: Path) -> Results | None:
    """The newest results file in a point's folder; None where the folder does not exist."""
    files = sorted(folder.glob("results_*.json"))
    if files:
        return Results.read(files[-1])
    if folder.is_dir():
        raise RecipeError(f"{folder} holds no results_*.json. Remove it and run the sweep again")
    return None


def _scores(raw: Mapping[str, Any]) -> dict[str, Score]:
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
            stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
            higher_is_better=bool(raw.get("higher_is_better", {}).get(task, {}).get(metric, True)),
            generative=config.get("output_type") == "generate_until",
            chance=_chance_of(raw, task),
        )
    return found


def _metrics(values: Mapping[str, Any]) -> list[str]:
    return [
        name
        for name, value in values.items()
        if "," in name and "_stderr," not in name and isinstance(value, (int, float)) and not isinstance(value, bool)
    ]


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
    while task not in configs:
        members = raw.get("group_subtasks", {}).get(task)
        if not members:
            return {}
        task = members[0]
    found: Mapping[str, Any] = configs[task]
    return found


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


def _listed(text: str) -> int:
    """The length of the list that a template such as ``{{[sol1, sol2]}}``, or a function's source, gives; 0 if unclear.

    >>> _listed("{{[sol1, sol2]}}"), _listed("{{choices.text}}")
    (2, 0)
    """
    try:
        body = ast.parse(text.strip().removeprefix("{{").removesuffix("}}").strip()).body
    except (SyntaxError, ValueError):
        return 0
    if len(body) != 1:
        return 0
    returned = [part.value for part in ast.walk(body[0]) if isinstance(part, (ast.Expr, ast.Return))]
    if len(returned) != 1 or not isinstance(found := returned[0], ast.List):
        return 0
    return 0 if any(isinstance(element, ast.Starred) for element in found.elts) else len(found.elts)
