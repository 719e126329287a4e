"""The model card: metadata that the Hub reads, and a first screen that a reader can believe. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from lmprune import hub
from lmprune.evaluation.rows import Score
from lmprune.models.locate import DEMO
from lmprune.reporting.words import (
    agreement_text,
    fenced,
    gate_text,
    in_markdown,
    markdown_table,
    score_text,
    task_text,
)
from lmprune.sharing.results import Measured
from lmprune.sharing.subjects import Subject
from lmprune.sharing.telling import facts, headline, narrower, strip
from lmprune.sweeping.points import BASELINE

_SHOWN_ABOVE = ("measured", "not measured", "warning")


@dataclass(frozen=True)
class Card:
    """What a card is made of.

    Attributes:
        repository: ``user/name``, where it will stand.
        subject: what is pushed; its ``kind`` tells whether weights come with it.
        measured: None where no results are pushed.
        pictures: path within the repository -> what it shows.
        files: the other files, by name.
        plain: whether plain mergekit runs the recipe, without a repaired config.
    """

    repository: str
    subject: Subject
    measured: Measured | None = None
    pictures: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[str] = ()
    plain: bool = False

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.repository.rpartition("/")[2]

    @property
    def base(self) -> str:
        """The uncut model, as others call it."""
        return self.subject.lineage.base.model or ""

    @property
    def weights(self) -> bool:
        """Whether this repository is a model itself."""
        return self.subject.kind != "recipe"

    def metadata(self) -> dict[str, Any]:
        """What stands between the dashes."""
        library = {"recipe": "lmprune", "checkpoint": "transformers", "adapter": "peft"}[self.subject.kind]
        tags = ["lmprune", *([] if self._beyond_mergekit else ["mergekit"]), "layer-pruning"]
        data: dict[str, Any] = {"library_name": library, "tags": tags}
        if hub.is_id(self.base):
            data["base_model"] = self.base
        if self.weights:
            data["pipeline_tag"] = "text-generation"
        if self.measured is not None:
            data["model-index"] = self.measured.model_index(self.name)
        return data

    def text(self) -> str:
        """The whole file."""
        head = yaml.dump(self.metadata(), sort_keys=False, default_flow_style=None, width=100, allow_unicode=True)
        parts = [f"# {in_markdown(self.name)}", *self._top(), *self._cost(), *self._size(), *self._commands(),
                 *self._unmeasured(), *self._provenance()]  # fmt: skip
        return f"---\n{head}---\n" + "\n\n".join(part for part in parts if part) + "\n"

    def _top(self) -> list[str]:
        plan, parts = self.subject.plan, [in_markdown(headline(self.subject) + ".")]
        if self.subject.lineage.healed:
            parts.append("The weights were healed after the cut: they are no longer the base's own.")
        if plan is not None:
            parts.append(fenced("\n".join(strip(plan)), "text"))
        parts += [f"![{in_markdown(alt)}]({path})" for path, alt in list(self.pictures.items())[:1]]
        return parts + [f"> ⚠ {in_markdown(line)}" for line in self._said("warning")]

    def _said(self, what: str) -> list[str]:
        return dict(facts(self.subject)).get(what, [])

    def _cost(self) -> list[str]:
        parts = ["## What it costs"]
        if self.measured is None:
            said = self._said("measured")
            told = [f"- {in_markdown(line)}" for line in said]
            source = in_markdown("; ".join(self._said("source")) or "its recipe")
            parts.append(f"Nothing was measured with lmprune. {source} says:" if said else "Nothing was measured.")
            return [*parts, *(["\n".join(told)] if told else [])]
        run, scores = self.measured.run, self.measured.scores
        parts.append(in_markdown(self.measured.sentence))
        rows = [[task_text(before), score_text(before), score_text(scores.get(task)), _lost(before, scores.get(task))]
                for task, before in run.base.items()]  # fmt: skip
        whole, cut = run.agreed(run.point(BASELINE)), run.agreed(self.measured.point)
        if whole is not None and cut is not None:
            error = (whole.loss_stderr**2 + cut.loss_stderr**2) ** 0.5
            change = f"{cut.loss - whole.loss:+.3f} ± {error:.3f}"
            rows.append(["loss (nats a token)", whole.loss_text, cut.loss_text, change])
            rows.append(["says the same as the unpruned model", "100 %", cut.same_text, ""])
        parts.append(markdown_table(["", "unpruned", "this cut", "change"], rows))
        limit = run.results[BASELINE].limit
        asked = f"At most {limit} documents of each task were asked. " if limit is not None else ""
        parts.append(in_markdown(f"{asked}± is the standard error of lm-evaluation-harness. {gate_text(run)}"))
        return [*parts, *([in_markdown(meaning)] if (meaning := agreement_text(run)) else [])]

    def _size(self) -> list[str]:
        plan = self.subject.plan
        if plan is None:
            return []
        rows = [["layers", str(plan.layers), str(len(plan.kept))], *(["", "", line] for line in narrower(plan))]
        before, after = (self.measured.bench(name) if self.measured else None for name in self._points())
        if before and after:
            rows += [
                ["parameters", f"{before['parameters']:,}", f"{after['parameters']:,}"],
                ["weights, MB", f"{before['weight_bytes'] / 1e6:,.1f}", f"{after['weight_bytes'] / 1e6:,.1f}"],
                *(
                    [f"{kind}, tokens/s", f"{before[f'{kind}_tokens_per_second']:,.1f}",
                     f"{after[f'{kind}_tokens_per_second']:,.1f} "
                     "({median:.2f} times, {low:.2f} to {high:.2f})".format(**after[f"{kind}_ratio"])]
                    for kind in ("prefill", "decode")
                ),
            ]  # fmt: skip
        parts = ["## Size and speed", markdown_table(["", "unpruned", "this cut"], rows)]
        if before and after and self.measured is not None:
            parts.append(in_markdown(f"Timed on {_hardware(self.measured)}."))
        return parts

    @property
    def _beyond_mergekit(self) -> bool:
        plan = self.subject.plan
        return plan is not None and not all(part.mergekit for part in plan.parts)

    def _points(self) -> tuple[str, str]:
        return BASELINE, self.measured.point.name if self.measured else ""

    def _commands(self) -> list[str]:
        usual = "lmprune_demo" if self.base == DEMO else "hellaswag,gsm8k"
        tasks = ",".join(self.measured.run.sweep.tasks) if self.measured else usual
        if self.weights:
            second, model = f"lmprune show {self.repository}", f"pretrained={self.repository}"
        else:
            second, model = f"lmprune prune {self.repository} OUT", f"pretrained={self.base},recipe={self.repository}"
        lines = ["pip install lmprune", second, f"lmprune eval --model_args {model} --tasks {tasks}"]
        parts = ["## Three commands", fenced("\n".join(lines), "sh")]
        if self.weights or not hub.is_id(self.base):
            return parts
        if self._beyond_mergekit:
            return [*parts, "mergekit cannot carry out this cut, and refuses the recipe."]
        if self.plain:
            get = f"hf download {self.repository} recipe.yml --local-dir . && mergekit-yaml recipe.yml OUT"
            return [*parts, "With mergekit alone:", fenced(get, "sh")]
        rebase = f"lmprune recipe {self.repository} --rebase -o recipe.yml && mergekit-yaml recipe.yml OUT"
        said = "mergekit needs a repaired config for this architecture, which lmprune makes:"
        return [*parts, said, fenced(rebase, "sh")]

    def _unmeasured(self) -> list[str]:
        lines = list(self._said("not measured"))
        if self.measured is None:
            lines = lines or ["loss, knowledge and reasoning"]
        else:
            lines = []
            verdict = self.measured.run.verdict(self.measured.point)
            lines += ["knowledge, beyond guessing"] if verdict.knowledge is None else []
            lines += ["reasoning by generation, beyond guessing"] if verdict.reasoning is None else []
            lines += ["the documents beyond those asked"] if self.measured.limited else []
            lines += ["speed"] if self.measured.bench(self.measured.point.name) is None else []
        lines.append("safety, bias and long texts")
        return ["## Not measured", "\n".join(f"- {in_markdown(line)}" for line in lines)]

    def _provenance(self) -> list[str]:
        rows = [[what, "; ".join(said)] for what, said in facts(self.subject) if what not in _SHOWN_ABOVE]
        if self.measured is not None:
            rows.append(["measured on", _hardware(self.measured)])
            rows.append(["versions", ", ".join(f"{k} {v}" for k, v in self.measured.run.sweep.versions.items())])
        links = [f"[{name}]({name})" for name in self.files if name not in ("README.md",)]
        rest = [f"![{in_markdown(alt)}]({path})" for path, alt in list(self.pictures.items())[1:]]
        table = markdown_table(["", ""], rows) if rows else ""
        return ["## Where it comes from", table, *rest, "Files: " + ", ".join(links) if links else ""]


def _lost(before: Score, after: Score | None) -> str:
    """What the cut changes, with the standard error of the difference where both have one."""
    if after is None:
        return "-"
    scale = 100 if before.higher_is_better and 0 <= before.value <= 1 else 1
    change = f"{scale * (after.value - before.value):+.{1 if scale == 100 else 3}f}"
    if before.stderr is None or after.stderr is None:
        return change
    error = scale * (before.stderr**2 + after.stderr**2) ** 0.5
    return f"{change} ± {error:.{1 if scale == 100 else 3}f}"


def _hardware(measured: Measured) -> str:
    found = measured.run.sweep.hardware
    cores = f"{found['cores']} cores" if found.get("cores") else None
    parts = (found.get("device"), found.get("gpu"), found.get("cpu"), cores, found.get("machine"), found.get("system"))
    return ", ".join(str(part) for part in parts if part)
