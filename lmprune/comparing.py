"""Criteria side by side on the same tokens: what each drops, what that costs on unseen text, and what choosing cost."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from lmprune.choosing import ModelEvidence, choose
from lmprune.criteria import OWN, Choice
from lmprune.criteria.one_shot import costs, critical
from lmprune.criteria.random import draw
from lmprune.cuts.plan import Plan, count_asked, spell
from lmprune.cuts.recipe import Recipe
from lmprune.errors import LmpruneError
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
        seconds, losses, profiles: what choosing cost, as if no other had chosen before.
        problem: why it chose nothing; the others are then None or 0.
    """

    criterion: str
    choice: Choice | None
    rise: float | None
    seconds: float = 0.0
    losses: int = 0
    profiles: int = 0
    problem: str | None = None


@dataclass(frozen=True, repr=False)
class Comparison:
    """Criteria side by side, the best first.

    Attributes:
        whole: the whole model's loss on the unseen text, in nats a token.
    """

    model: str
    count: int
    whole: float
    rows: tuple[Compared, ...]

    def __repr__(self) -> str:
        best = next(row for row in self.rows if row.rise is not None)
        return (
            f"<Comparison of {len(self.rows)} criteria for {self.count} layers of {self.model}: {best.criterion} first>"
        )

    def _repr_html_(self) -> str:
        """The table, for a notebook."""
        head, rows = self.table()
        cells = [("th", head), *(("td", row) for row in rows)]
        lines = ("".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) for tag, row in cells)
        return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"

    def overlap(self, row: Compared) -> int | None:
        """Layers that ``row`` has in common with the first one's."""
        first = next((other.choice for other in self.rows if other.choice is not None), None)
        if row.choice is None or first is None:
            return None
        return len(set(first.plan.dropped) & set(row.choice.plan.dropped))

    def to_data(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        rows = [
            {
                "criterion": row.criterion,
                "dropped": list(row.choice.plan.dropped) if row.choice else None,
                "rise": row.rise,
                "overlap": self.overlap(row),
                "seconds": round(row.seconds, 3),
                "losses": row.losses,
                "profiles": row.profiles,
                "reason": row.choice.reason if row.choice else None,
                "problem": row.problem,
            }
            for row in self.rows
        ]
        return {"model": self.model, "count": self.count, "whole": self.whole, "rows": rows}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows for people."""
        head = ["criterion", "layers", "loss", "rise", "in common", "losses", "profiles", "seconds"]
        rows = []
        for row in self.rows:
            if row.rise is None:
                rows.append([row.criterion, row.problem or "", "", "", "", "", "", ""])
                continue
            shared = self.overlap(row)
            rows.append(
                [
                    row.criterion,
                    gone(row.choice.plan) if row.choice else f"median of {DRAWS} draws",
                    f"{self.whole + row.rise:.4f}",
                    f"{row.rise:+.4f}",
                    "" if shared is None else f"{shared} of {self.count}",
                    str(row.losses),
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
) -> Comparison:
    """Let every criterion choose on the same tokens, and judge all choices on others.

    Args:
        criteria: names in `CRITERIA`; by default all of ours. ``random`` stands for the median of `DRAWS` draws.

    Raises:
        As `lmprune.choose`; a criterion that cannot choose here has its reason in its row.
    """
    counted = count_asked(drop, fraction)
    cut = open_cut(model)
    count = counted(cut.layers)
    evidence = ModelEvidence(cut, settings, data, protect=protect)
    evidence.prepare()  # so that no criterion's seconds hold the loading
    rows = [_row(name, count, evidence) for name in criteria or OWN]
    plans = [row.choice.plan for row in rows if row.choice is not None]
    draws = [Plan(cut.layers, draw(count, evidence, seed)) for seed in range(DRAWS)]
    judged = evidence.judged([Plan(cut.layers), *plans, *draws]).mean()
    whole, rises = float(judged[0]), dict(zip(plans, (judged[1:] - judged[0]).tolist()))
    by_chance = median((judged[1 + len(plans) :] - judged[0]).tolist())
    found = []
    for row in rows:
        if row.criterion == "random":
            found.append(Compared("random", None, by_chance))
        else:
            rise = rises[row.choice.plan] if row.choice else None
            found.append(Compared(row.criterion, row.choice, rise, row.seconds, row.losses, row.profiles, row.problem))
    ordered = sorted(found, key=lambda row: (row.rise is None, row.rise or 0.0))
    return Comparison(cut.name, count, whole, tuple(ordered))


def _row(name: str, count: int, evidence: ModelEvidence) -> Compared:
    fresh, since = evidence.fresh(), time.monotonic()
    try:
        made = choose(fresh.cut, name, drop=count, evidence=fresh)
    except LmpruneError as exc:
        return Compared(name, None, None, problem=str(exc))
    return Compared(name, made, 0.0, time.monotonic() - since, fresh.losses_asked, fresh.profiles_made)


@dataclass(frozen=True)
class LayerCosts:
    """What every single layer is worth: nats a token that the loss rises by without it, and what it changes."""

    model: str
    rise: dict[int, float]
    block_influence: tuple[float, ...]
    relative_magnitude: tuple[float, ...]

    @property
    def critical(self) -> tuple[int, ...]:
        """Layers without which the loss rises by more than ten times the median."""
        return critical(self.rise)

    def to_data(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "model": self.model,
            "rise": {str(layer): value for layer, value in self.rise.items()},
            "block_influence": list(self.block_influence),
            "relative_magnitude": list(self.relative_magnitude),
            "critical": list(self.critical),
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows for people."""
        head = ["layer", "loss rises by", "block influence", "relative magnitude", ""]
        rows = [
            [
                str(layer),
                f"{value:+.4f}",
                f"{self.block_influence[layer]:.4f}",
                f"{self.relative_magnitude[layer]:.4f}",
                "critical" if layer in self.critical else "",
            ]
            for layer, value in self.rise.items()
        ]
        return head, rows


def gone(plan: Plan) -> str:
    """What goes, in short: ``4,7; the MLP of 3``."""
    return "; ".join([*([spell(plan.dropped)] if plan.dropped else []), *(part.describe() for part in plan.parts)])


def layer_costs(
    model: str | Path | Recipe | Cut, settings: ProfileSettings | None = None, data: DataSettings | None = None
) -> LayerCosts:
    """Switch off every layer in turn (the Lobotomy study's picture); errors as `lmprune.choose`."""
    cut = open_cut(model)
    evidence = ModelEvidence(cut, settings, data)
    profile = evidence.profile()
    rise = costs(evidence, tuple(range(cut.layers)))
    return LayerCosts(
        cut.name, rise, tuple(map(float, profile.block_influence)), tuple(map(float, profile.relative_magnitude))
    )
