"""A cut's scores in the two forms that the Hub reads: ``model-index`` of a card, and ``.eval_results/*.yaml``. Pure.

The second shows on a benchmark's own page where its data set is on the Hub's list of benchmarks; so only scores on all
documents of a task go there, never those of a limited run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lmprune import hub
from lmprune.cuts.plan import Plan, spell
from lmprune.errors import RecipeError, nearest
from lmprune.evaluation.rows import Score
from lmprune.reporting.collect import Collected
from lmprune.sweeping.points import BASELINE, Point

HARNESS = "https://github.com/EleutherAI/lm-evaluation-harness"
_BENCHMARKS = {"openai/gsm8k": "gsm8k", "TIGER-Lab/MMLU-Pro": "mmlu_pro", "Idavidrein/gpqa": "diamond"}
"""Data sets that are benchmarks of the Hub -> what their own files call the task."""
_PARTIAL = ("lmprune_quick",)
"""Our tasks that ask a part of a benchmark."""


@dataclass(frozen=True)
class Measured:
    """What a sweep measured of one cut.

    Attributes:
        point: the cut itself, or the repaired or healed one.
    """

    run: Collected
    point: Point

    @classmethod
    def of(cls, run: Collected, plan: Plan, fingerprint: str | None, *, made: str) -> Measured:
        """The point of ``run`` that leaves out what ``plan`` does.

        Raises:
            RecipeError: the run measured another model or other cuts, or not yet this one.
        """
        theirs = run.sweep.model.get("fingerprint")
        if fingerprint is not None and theirs != fingerprint:
            raise RecipeError(
                f"{run.folder} measured {run.sweep.model.get('name')} with the weights {theirs}, and the recipe is for "
                f"{fingerprint}. Give the run of this model"
            )
        found = [p for p in run.sweep.points if p.plan == plan and p.made == made]
        if not found:
            cuts = [f"{p.name} ({p.what})" for p in run.sweep.points if p.is_cut and p.made == made]
            close = nearest(spell(plan.dropped), [spell(p.dropped) for p in run.sweep.points if p.n])
            what = f"{made} cut".strip()
            wanted = f"that {plan.describe()}" if plan.parts else f"without the layers {spell(plan.dropped)}{close}"
            raise RecipeError(
                f"{run.folder} has no {what} {wanted}: it has "
                f"{', '.join(cuts[:6]) or 'none'}. Give the run that measured this one"
            )
        if found[0].name not in run.results:
            raise RecipeError(
                f"{run.folder} has not measured {found[0].name} yet. Run the same `lmprune sweep` to go on"
            )
        return cls(run, found[0])

    @property
    def scores(self) -> Mapping[str, Score]:
        """The cut's scores by task."""
        return self.run.results[self.point.name].scores

    @property
    def sentence(self) -> str:
        """What is left of knowledge and reasoning, in one sentence."""
        return self.run.verdict(self.point).sentence(self.run.describe(self.point))

    def bench(self, name: str) -> Mapping[str, Any] | None:
        """The speed row of a point at the smallest prompt and batch; None where it was not timed."""
        from lmprune.reporting.words import every_bench_row

        return next((row for row in every_bench_row(self.run) if row["name"] == name), None)

    @property
    def limited(self) -> bool:
        """Whether only some documents of each task were asked."""
        return self.run.results[BASELINE].limit is not None

    # --- the Hub's forms ----------------------------------------------------------------------------------------

    def model_index(self, name: str) -> list[dict[str, Any]]:
        """What a card's ``model-index`` holds."""
        return [{"name": name, "results": [self._index_row(score) for score in self.scores.values()]}]

    def _index_row(self, score: Score) -> dict[str, Any]:
        note = self._note(score.task)
        metric: dict[str, Any] = {"type": score.metric, "value": _shown(score), "name": score.metric.replace("_", " ")}
        if score.stderr is not None:
            metric["args"] = {"stderr": _scaled(score, score.stderr)}
        where = note.get("dataset")
        dataset: dict[str, Any] = {"name": score.task, "type": where if where and hub.is_id(str(where)) else score.task}
        if note.get("subset"):
            dataset["config"] = str(note["subset"])
        source = {"name": f"lm-evaluation-harness {self.run.results[self.point.name].harness}", "url": HARNESS}
        return {
            "task": {"type": "text-generation", "name": "Text generation"},
            "dataset": dataset,
            "metrics": [metric],
            "source": source,
        }

    def eval_files(self, date: str) -> dict[str, list[dict[str, Any]]]:
        """File name -> entries of ``.eval_results/``: one file a data set that is on the Hub."""
        found: dict[str, list[dict[str, Any]]] = {}
        if self.limited:
            return found
        for score, dataset in self._whole():
            entry = {
                "dataset": {"id": dataset, "task_id": _BENCHMARKS.get(dataset, score.task)},
                "value": _shown(score),
                "date": date,
                "source": {
                    "url": HARNESS,
                    "name": f"lm-evaluation-harness {self.run.results[self.point.name].harness}",
                },
                "notes": self._notes(score),
            }
            found.setdefault(f"{dataset.replace('/', '--')}.yaml", []).append(entry)
        return found

    def _whole(self) -> Iterator[tuple[Score, str]]:
        """The scores on all documents of a data set of the Hub, with its id."""
        for score in self.scores.values():
            dataset = str(self._note(score.task).get("dataset") or "")
            if hub.is_id(dataset) and score.higher_is_better and not score.task.startswith(_PARTIAL):
                yield score, dataset

    def _note(self, task: str) -> Mapping[str, Any]:
        """What the sweep noted of a task's documents; of a group, of its first member."""
        result = self.run.results[self.point.name]
        members = result.raw.get("group_subtasks", {}).get(task) or [task]
        return next((result.data[name] for name in (task, *members) if name in result.data), {})

    def _notes(self, score: Score) -> str:
        error = f"standard error {_scaled(score, score.stderr)}, " if score.stderr is not None else ""
        shots = self._note(score.task).get("shots")
        examples = f"{shots} examples, " if shots is not None else ""
        healed = f", {self.point.made}" if self.point.made else ""
        plan = self.point.plan
        missing = f"{self.point.n} of {self.point.layers} layers dropped"
        missing = plan.describe() if plan is not None and plan.parts else missing
        return f"{score.metric}, {error}{examples}{missing}{healed}"


def _scaled(score: Score, value: float) -> float:
    """Shares in per cent, as the Hub's pages show them."""
    return round(100 * value, 2) if score.higher_is_better and 0 <= score.value <= 1 else round(value, 4)


def _shown(score: Score) -> float:
    return _scaled(score, score.value)
