"""Let the others propose, mend the best proposals by exchanging layers, and judge on text that none of them saw.

Ours. Proposals: the angular block, the best segment, one-shot and greedy. From the two that cost least, the exchange
tries every pair of a dropped and a kept layer, and goes on while that lowers the loss.
"""

from __future__ import annotations

from collections.abc import Callable

from lmprune.criteria import angular, greedy, one_shot, segment
from lmprune.criteria.evidence import Choice, Evidence, may_go
from lmprune.cuts.plan import Plan
from lmprune.errors import PlanError

PROPOSERS: dict[str, Callable[[int, Evidence], Choice]] = {
    "angular": angular.choose,
    "segment": segment.choose,
    "one-shot": one_shot.choose,
    "greedy": greedy.choose,
}
STARTS = 2
"""Proposals that are mended: one alone may be a dead end."""
ROUNDS = 3
"""Rounds of exchange at most; more have not been seen to help."""

OBJECTIVE = "loss+self"
"""Text, and the model's own answers: either alone gives up what it does not see."""


def choose(count: int, evidence: Evidence) -> Choice:
    """``count`` layers."""
    free = set(may_go(evidence, count))
    proposals: dict[Plan, str] = {}
    for name, propose in PROPOSERS.items():
        try:
            proposals.setdefault(propose(count, evidence).plan, name)
        except PlanError:  # no free block of that size
            continue
    first = list(proposals)
    order = evidence.losses(first).mean().argsort(kind="stable")
    for start in order[:STARTS]:
        proposals.setdefault(_exchanged(first[int(start)], free, evidence), "an exchange of layers")
    plans = list(proposals)
    judged = evidence.judged([Plan(evidence.layers), *plans]).mean()
    best = plans[int(judged[1:].argmin())]
    rise = float(judged[1:].min() - judged[0])
    said = f"proposed by {proposals[best]}; on unseen text it costs {rise:.4f} nats a token"
    table = {name: round(float(loss - judged[0]), 6) for (_, name), loss in zip(proposals.items(), judged[1:])}
    return Choice(best, said, {"costs": table})


def _exchanged(plan: Plan, free: set[int], evidence: Evidence) -> Plan:
    for _ in range(ROUNDS):
        others = [
            Plan(plan.layers, tuple({*plan.dropped, into} - {out}))
            for out in plan.dropped
            for into in sorted(free - set(plan.dropped))
        ]
        if not others:
            return plan
        losses = evidence.ranked([plan, *others])
        if losses.argmin() == 0:
            return plan
        plan = [plan, *others][int(losses.argmin())]
    return plan
