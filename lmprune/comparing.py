"""Criteria side by side on the same tokens: what each drops, what that costs on unseen text, and what choosing cost.

And every single layer of a model: what it is worth, by objectives and tasks.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from lmprune.choosing import LOSS, ModelEvidence, choose, write_recipe
from lmprune.criteria import OWN, Choice
from lmprune.criteria.one_shot import costs, critical
from lmprune.criteria.random import draw
from lmprune.criteria.settings import ChoiceSettings
from lmprune.cuts.plan import Plan, count_asked, spell
from lmprune.cuts.recipe import Recipe
from lmprune.cuts.sublayers import PROJECTIONS, Sublayers
from lmprune.errors import LmpruneError, UsageError
from lmprune.evaluation.rows import Score, scores_of
from lmprune.models.cut import Cut, open_cut
from lmprune.profiling.settings import ProfileSettings
from lmprune.text.sources import DataSettings

DRAWS = 20
"""Sets of layers drawn at random, whose median the others must beat."""


@dataclass(frozen=True)
class Compared:
    """One criterion's choice.

    Attributes:
        rise: nats a token that the loss on unseen text rises by; of random draws the median.
        error: its standard error over the samples of that text; None of a median.
        judged: the same by the objective that was asked for, if one was.
        repaired: the rise once the cut is repaired, where a repair was asked for.
        seconds, losses, profiles: what choosing cost, as if no other had chosen before.
        passes: what its losses took, in passes of the whole model over the text.
        scores: by task, where tasks were asked for.
        problem: why it chose nothing; the others are then None or 0.
    """

    criterion: str
    choice: Choice | None
    rise: float | None
    judged: float | None = None
    seconds: float = 0.0
    losses: int = 0
    profiles: int = 0
    passes: float = 0.0
    scores: Mapping[str, Score] = field(default_factory=dict)
    problem: str | None = None
    error: float | None = None
    repaired: float | None = None


@dataclass(frozen=True, repr=False)
class Comparison:
    """Criteria side by side, the best first.

    Attributes:
        whole: the whole model's loss on the unseen text, in nats a token.
        objective: what was asked for, by which the criteria that measure a loss chose.
        scores: the whole model's, by task.
        after: the repair that was asked for.
    """

    model: str
    count: int
    whole: float
    rows: tuple[Compared, ...]
    objective: str | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    after: str | None = None

    def __repr__(self) -> str:
        best = next((row.criterion for row in self.rows if row.rise is not None), "none")
        return f"<Comparison of {len(self.rows)} criteria for {self.count} layers of {self.model}: {best} first>"

    def _repr_html_(self) -> str:
        """The table, for a notebook."""
        head, rows = self.table()
        cells = [("th", head), *(("td", row) for row in rows)]
        lines = ("".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) for tag, row in cells)
        return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"

    def overlap(self, row: Compared) -> float | None:
        """Layers that go in ``row`` and in the first one; an attention or an MLP is half of one."""
        first = next((other.choice for other in self.rows if other.choice is not None), None)
        if row.choice is None or first is None:
            return None
        return len(_sublayers(first.plan) & _sublayers(row.choice.plan)) / 2

    def to_data(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        rows = [
            {
                "criterion": row.criterion,
                "dropped": list(row.choice.plan.dropped) if row.choice else None,
                "parts": {part.kind: part.to_data() for part in row.choice.plan.parts} if row.choice else {},
                "objective": row.choice.details.get("objective") if row.choice else None,
                "rise": None if row.rise is None else {"value": row.rise, "error": row.error},
                "judged": row.judged,
                "repaired": row.repaired,
                "overlap": self.overlap(row),
                "seconds": round(row.seconds, 3),
                "losses_asked": row.losses,
                "passes": round(row.passes, 2),
                "profiles": row.profiles,
                "scores": _with_errors(row.scores),
                "reason": row.choice.reason if row.choice else None,
                "problem": row.problem,
            }
            for row in self.rows
        ]
        said = {"model": self.model, "count": self.count, "whole": self.whole, "objective": self.objective}
        said["after"] = self.after
        return {**said, "scores": _with_errors(self.scores), "rows": rows}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows for people."""
        asked = [self.objective] if self.objective not in (None, LOSS) else []
        after = [f"after {self.after}"] if self.after else []
        head = ["criterion", "layers", "loss", "rise", *after, *map(str, asked), *self.scores, "in common"]
        head += ["losses", "passes", "profiles", "seconds"]
        rows = []
        for row in self.rows:
            if row.rise is None:
                rows.append([row.criterion, row.problem or "", *[""] * (len(head) - 2)])
                continue
            shared = self.overlap(row)
            rows.append(
                [
                    row.criterion,
                    gone(row.choice.plan) if row.choice else f"median of {DRAWS} draws",
                    f"{self.whole + row.rise:.4f}",
                    f"{row.rise:+.4f}",
                    *(f"{row.repaired:+.4f}" if row.repaired is not None else "" for _ in after),
                    *(f"{row.judged:+.4f}" if row.judged is not None else "" for _ in asked),
                    *(f"{row.scores[task].value:.3f}" if task in row.scores else "" for task in self.scores),
                    "" if shared is None else f"{shared:g} of {self.count}",
                    str(row.losses),
                    f"{row.passes:.1f}",
                    str(row.profiles),
                    f"{row.seconds:.1f}",
                ]
            )
        return head, rows


def compare(
    model: str | Path | Recipe | Cut,
    *,
    drop: int | None = None,
    fraction: float | None = None,
    criteria: Sequence[str] | None = None,
    settings: ProfileSettings | None = None,
    data: DataSettings | None = None,
    protect: Iterable[int] = (),
    how: ChoiceSettings | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    include_path: str | None = None,
) -> Comparison:
    """Let every criterion choose on the same tokens, and judge all choices on others.

    Args:
        criteria: names in `CRITERIA`; by default all of ours. ``random`` stands for the median of `DRAWS` draws.
        how: the objective is for those that measure a loss; without one, each has its own.
        tasks: of the harness, on which every choice is evaluated, on ``limit`` documents of each.
        include_path: a folder with tasks of one's own.

    Raises:
        As `lmprune.choose`; a criterion that cannot choose here has its reason in its row.
    """
    counted, how = count_asked(drop, fraction), how or ChoiceSettings()
    if how.max_loss is not None or how.max_increase is not None:
        raise UsageError("compare takes --drop or --fraction: the criteria are compared at one number of layers")
    cut = open_cut(model)
    count = counted(cut.layers)
    evidence = ModelEvidence(cut, settings, data, protect=protect, how=how)
    if how.after is not None:
        evidence.check_repair(None)
    evidence.prepare()  # so that no criterion's seconds hold the loading
    rows = [_row(name, count, evidence) for name in criteria or OWN]
    plans = [Plan(cut.layers), *(row.choice.plan for row in rows if row.choice is not None)]
    draws = [Plan(cut.layers, draw(count, evidence, seed)) for seed in range(DRAWS)]
    objectives = dict.fromkeys([LOSS, *([how.objective] if how.objective else [])])
    rises = {name: _rises(evidence.by(name), [*plans, *draws]) for name in objectives}
    scores = dict(zip(plans, _scores(cut, plans, tasks, limit, include_path)))
    found = [_judged(row, list(rises.values()), draws, scores) for row in rows]
    whole = float(evidence.by(LOSS).judged(plans[:1]).mean()[0])
    if how.after is not None:
        found = [replace(row, repaired=_repaired_rise(row.choice, whole, evidence)) for row in found]
    ordered = sorted(found, key=lambda row: (row.rise is None, row.rise or 0.0))
    return Comparison(cut.name, count, whole, tuple(ordered), how.objective, scores[plans[0]], how.after)


def _judged(
    row: Compared,
    rises: Sequence[Mapping[Plan, tuple[float, float]]],
    draws: Sequence[Plan],
    scores: Mapping[Plan, Mapping[str, Score]],
) -> Compared:
    """``row`` with what its choice costs: by the loss, the first of ``rises``, and by the objective, the last."""
    if row.choice is None:
        return replace(row, rise=None, judged=None)
    if row.criterion == "random":
        first, last = (median(found[plan][0] for plan in draws) for found in (rises[0], rises[-1]))
        return replace(row, choice=None, rise=first, judged=last)
    plan = row.choice.plan
    rise, error = rises[0][plan]
    return replace(row, rise=rise, error=error, judged=rises[-1][plan][0], scores=scores[plan])


def _repaired_rise(choice: Choice | None, whole: float, evidence: ModelEvidence) -> float | None:
    """What a cut of whole layers adds to the loss on unseen text once it is repaired."""
    if choice is None or choice.plan.parts:
        return None
    return float(evidence.by(LOSS).repaired(choice.plan).judged([choice.plan]).mean()[0]) - whole


def _row(name: str, count: int, evidence: ModelEvidence) -> Compared:
    """The choice, by the objective that was asked for where the criterion takes one."""
    fresh, since = evidence.fresh(), time.monotonic()
    if name in OWN and not hasattr(OWN[name], "OBJECTIVE"):
        fresh.how = ChoiceSettings()
    if not hasattr(OWN.get(name), "repairs"):
        fresh.after = None
    try:
        made = choose(fresh.cut, name, drop=count, evidence=fresh)
    except LmpruneError as exc:
        return Compared(name, None, None, problem=str(exc))
    seconds = time.monotonic() - since
    return Compared(name, made, 0.0, None, seconds, fresh.losses_asked, fresh.profiles_made, fresh.passes)


def _rises(evidence: ModelEvidence, plans: Sequence[Plan]) -> dict[Plan, tuple[float, float]]:
    """What each plan adds to the first one's loss on unseen text, and the standard error of that."""
    judged = evidence.judged(plans)
    means = judged.mean()
    return dict(zip(plans, zip((means - means[0]).tolist(), judged.errors().tolist())))


def _with_errors(scores: Mapping[str, Score]) -> dict[str, dict[str, float | None]]:
    """Each task's score with its standard error."""
    return {task: {"value": score.value, "error": score.stderr} for task, score in scores.items()}


def _scores(
    cut: Cut, plans: Sequence[Plan], tasks: Sequence[str], limit: int | None, include_path: str | None
) -> list[dict[str, Score]]:
    """By task, of the model without what each plan drops."""
    if not tasks:
        return [{} for _ in plans]
    from lmprune.evaluation.harness import evaluate

    found = []
    with tempfile.TemporaryDirectory(prefix="lmprune-") as scratch:
        for number, plan in enumerate(plans):
            recipe = Path(scratch) / f"{number}.yml"
            if plan.dropped or plan.parts:
                write_recipe(cut, plan, recipe)
            model = recipe if recipe.is_file() else cut.name
            results = evaluate(model, list(tasks), limit=limit, include_path=include_path)
            found.append(dict(scores_of(results)))
    return found


def gone(plan: Plan) -> str:
    """What goes, in short: ``4,7; the MLP of 3``."""
    return "; ".join([*([spell(plan.dropped)] if plan.dropped else []), *(part.describe() for part in plan.parts)])


def _sublayers(plan: Plan) -> set[tuple[int, str]]:
    """What goes, as single attentions and MLPs."""
    whole = {(layer, name) for layer in plan.dropped for name in PROJECTIONS}
    parts = [part for part in plan.parts if isinstance(part, Sublayers)]
    return whole | {(layer, name) for part in parts for layer in plan.kept for name in part.of_layer(layer)}


# --- single layers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerCosts:
    """What every single layer is worth.

    Attributes:
        rises: by objective, layer -> nats a token that it rises by without the layer.
        errors: likewise, the standard errors of these over samples.
        scores: by task, layer -> what the model scores without it.
        whole: by task, what the whole model scores.
        seconds: what profile and losses took, the model being loaded.
        passes: what the losses took, in passes of the whole model over the text; the profile is one more.
    """

    model: str
    rises: Mapping[str, Mapping[int, float]]
    block_influence: tuple[float, ...]
    relative_magnitude: tuple[float, ...]
    scores: Mapping[str, Mapping[int, Score]] = field(default_factory=dict)
    whole: Mapping[str, Score] = field(default_factory=dict)
    errors: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    seconds: float = 0.0
    passes: float = 0.0

    @property
    def rise(self) -> Mapping[int, float]:
        """By the first objective."""
        return next(iter(self.rises.values()))

    @property
    def critical(self) -> tuple[int, ...]:
        """Layers without which the first objective rises by more than ten times the median."""
        return critical(dict(self.rise))

    def to_data(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        rows = [
            {
                "layer": layer,
                "rises": {
                    name: {"value": rise[layer], "error": self.errors.get(name, {}).get(layer)}
                    for name, rise in self.rises.items()
                },
                "scores": _with_errors({task: found[layer] for task, found in self.scores.items()}),
                "block_influence": self.block_influence[layer],
                "relative_magnitude": self.relative_magnitude[layer],
                "critical": layer in self.critical,
            }
            for layer in self.rise
        ]
        took = {"seconds": round(self.seconds, 3), "passes": round(self.passes, 2)}
        return {"model": self.model, **took, "scores": _with_errors(self.whole), "rows": rows}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows for people."""
        rises = [f"{name} rises by" for name in self.rises]
        head = ["layer", *rises, *self.scores, "block influence", "relative magnitude", ""]
        rows = [
            [
                str(layer),
                *(f"{rise[layer]:+.4f}" for rise in self.rises.values()),
                *(f"{found[layer].value:.3f}" for found in self.scores.values()),
                f"{self.block_influence[layer]:.4f}",
                f"{self.relative_magnitude[layer]:.4f}",
                "critical" if layer in self.critical else "",
            ]
            for layer in self.rise
        ]
        return head, rows


def layer_costs(
    model: str | Path | Recipe | Cut,
    settings: ProfileSettings | None = None,
    data: DataSettings | None = None,
    *,
    objectives: Sequence[str] = (LOSS,),
    tasks: Sequence[str] = (),
    limit: int | None = None,
    include_path: str | None = None,
) -> LayerCosts:
    """Switch off every layer in turn (the Lobotomy study's picture); errors as `lmprune.choose`.

    Args:
        objectives: as of `ChoiceSettings`.
        tasks: of the harness, on which the model without each layer is evaluated, on ``limit`` documents of each.
        include_path: a folder with tasks of one's own.
    """
    cut = open_cut(model)
    evidence = ModelEvidence(cut, settings, data)
    evidence.prepare()
    since = time.monotonic()
    judging = {name: evidence.by(name) for name in objectives}
    profile, every = evidence.profile(), tuple(range(cut.layers))
    rises = {name: costs(by, every) for name, by in judging.items()}
    plans = [Plan(cut.layers), *(Plan(cut.layers, (at,)) for at in every)]
    errors = {name: dict(zip(every, by.losses(plans).errors()[1:].tolist())) for name, by in judging.items()}
    seconds = time.monotonic() - since
    whole, *without = _scores(cut, plans, tasks, limit, include_path)
    scores = {task: {layer: without[layer][task] for layer in every} for task in whole}
    influence, magnitude = (tuple(map(float, found)) for found in (profile.block_influence, profile.relative_magnitude))
    return LayerCosts(cut.name, rises, influence, magnitude, scores, whole, errors, seconds, evidence.passes)
