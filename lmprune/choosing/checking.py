"""What a cut costs on text that it was not chosen on, and how much may be cut at a price."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from lmprune.choosing.evidence import LOSS, ModelEvidence
from lmprune.criteria import one_shot
from lmprune.criteria.evidence import Choice
from lmprune.cuts.plan import Plan, spell
from lmprune.errors import LmpruneError, PlanError

MUCH, LEAST = 1.5, 0.05
"""A choice is much worse than another where it costs so many times as much, and so many nats a token more."""


CHECKED = 64
"""Unseen samples that a cut is measured on, at most."""


@dataclass(frozen=True)
class Check:
    """The loss on unseen text, in nats a token.

    Attributes:
        whole, cut: of the whole model, and of what is left.
        error: standard error of the second less the first, over the samples.
        samples: of unseen text.
        better: what costs much less, where something cheap to find does: how it is found, and its loss.
        repaired: the method that the cut was judged after, and the loss then.
    """

    whole: float
    cut: float
    samples: int
    error: float
    better: tuple[str, float] | None = None
    repaired: tuple[str, float] | None = None

    def describe(self) -> str:
        """One line for people."""
        rise = f"{self.cut - self.whole:+.4f} ± {self.error:.4f}"
        said = f"loss on unseen text: {self.whole:.4f} whole, {self.cut:.4f} cut ({rise} nats a token)"
        if self.repaired is not None:
            name, loss = self.repaired
            said += f"; {loss:.4f} after {name} ({loss - self.whole:+.4f})"
        return said

    def to_data(self) -> dict[str, Any]:
        """Plain data for the recipe."""
        found = {"whole": round(self.whole, 6), "cut": round(self.cut, 6), "error": round(self.error, 6)}
        found["samples"] = self.samples
        return found | ({self.repaired[0]: round(self.repaired[1], 6)} if self.repaired is not None else {})


def check(plan: Plan, evidence: ModelEvidence, *, alternative: bool = False) -> Check:
    """Measure the whole model and ``plan`` on unseen text: two passes; after the repair too, where one was asked for.

    Args:
        alternative: also look for a cut of as many layers that costs much less, by switching off each layer in turn on
            a few samples.

    Raises:
        LmpruneError: the model or the text cannot be had.
    """
    by_loss = evidence.by(LOSS)
    plans = [Plan(evidence.layers), plan]
    count = len(plan.dropped)
    if alternative and count:
        with suppress(PlanError):  # protection leaves too few
            plans.append(one_shot.choose(count, by_loss.on_few()).plan)
    found = by_loss.judged(plans, samples=CHECKED)
    losses = [float(loss) for loss in found.mean()]
    rise = losses[1] - losses[0]
    better = None
    if len(plans) > 2 and rise > MUCH * (losses[2] - losses[0]) and rise > losses[2] - losses[0] + LEAST:
        better = (f"one-shot drops {spell(plans[2].dropped)}", losses[2])
    repaired = None
    if evidence.after is not None and plan.dropped:
        loss = float(by_loss.repaired(plan).judged([plan], samples=CHECKED).mean()[0])
        repaired = (evidence.after, loss)
    return Check(losses[0], losses[1], found.values.shape[1], float(found.errors()[1]), better, repaired)


def within_budget(budget: float, evidence: ModelEvidence, choose: Callable[[int], Choice]) -> Choice:
    """The choice of the most layers whose loss on unseen text, after the repair that was asked for, rises by at most
    ``budget`` nats a token.

    Layers are added one by one until a choice costs more: the price of each number is known by then.

    Raises:
        PlanError: one layer costs more already.
    """
    by_loss, within = evidence.by(LOSS), None
    rises: dict[str, float] = {}
    problem: LmpruneError | None = None
    for count in range(1, evidence.layers):
        try:
            made = choose(count)
        except PlanError as exc:  # protection leaves no more
            problem = exc
            break
        (whole,) = by_loss.judged([Plan(evidence.layers)]).mean()
        (cut,) = by_loss.repaired(made.plan).judged([made.plan]).mean()
        rises[str(count)] = round(float(cut - whole), 6)
        if cut - whole > budget:
            break
        within = made
    if within is None:
        if problem is not None:
            raise problem
        raise PlanError(f"--max-loss {budget:g}: one layer costs {rises['1']:.4f} nats a token already. Allow more")
    return replace(within, details={**within.details, "max_loss": budget, "rises": rises})
