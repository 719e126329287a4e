"""Harness results files -> rows of numbers. Pure: reads files and needs no harness."""

from __future__ import annotations

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
            chance=_chance(config),
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


def _chance(config: Mapping[str, Any]) -> float:
    """What guessing gives: one over the number of choices, where the task states a list of them."""
    choices = config.get("doc_to_choice")
    if config.get("output_type") != "multiple_choice":
        return 0.0
    return 1 / len(choices) if isinstance(choices, list) and choices else 0.25
