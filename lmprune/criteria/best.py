"""Let the others propose, mend the best proposals by exchanging layers, and judge on text that none of them saw.

Ours. Proposals: the angular block, the best segment, one-shot and greedy. From the two that cost least, the exchange
tries every pair of a dropped and a kept layer, and goes on while that lowers the loss. With a repair (``--after``) the
cuts that cost least of all that were looked at, and greedy's, which sees the repair already, are repaired, and judged
as they are then: the order changes with it. Of cuts that noise does not tell apart, the one that loses the fewest of
the model's sure answers: nats are what a repair and training give back first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lmprune.criteria import angular, greedy, one_shot, segment
from lmprune.criteria.evidence import Choice, Evidence, Losses, may_go
from lmprune.cuts.plan import Plan, spell
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

FINALISTS = 6
"""Cuts that are repaired, where a repair is asked for."""

OBJECTIVE = "loss+self"
"""Text, and the model's own answers: either alone gives up what it does not see."""
ANSWERS = "answers"
JUDGED_BY = f"{OBJECTIVE}+{ANSWERS}"
"""In the last round, unless an objective is asked for: also the share of sure answers that are lost in one token."""


def repairs(count: int) -> int:
    """How many cuts are repaired to choose ``count`` layers, where a repair is asked for."""
    return FINALISTS + greedy.repairs(count)


def choose(count: int, evidence: Evidence) -> Choice:
    """``count`` layers."""
    free, seen = set(may_go(evidence, count)), dict[Plan, float]()
    proposals: dict[Plan, str] = {}
    for name, propose in PROPOSERS.items():
        try:
            proposals.setdefault(propose(count, evidence).plan, name)
        except PlanError:  # no free block of that size
            continue
    first = list(proposals)
    losses = evidence.losses(first).mean()
    seen |= zip(first, losses.tolist())
    for start in losses.argsort(kind="stable")[:STARTS]:
        proposals.setdefault(_exchanged(first[int(start)], free, evidence, seen), "an exchange of layers")
    return _last_round(proposals, _finalists(seen, first) if evidence.after else list(proposals), evidence)


def _last_round(proposals: Mapping[Plan, str], plans: Sequence[Plan], evidence: Evidence) -> Choice:
    """Of ``plans``, once they are repaired where that is asked for, the one that is best on unseen text."""
    whole, *_ = every = [Plan(evidence.layers), *plans]
    judged = evidence.judged_repaired(every)
    costs = dict(zip(every, judged.mean().tolist()))
    answers = judged.parts.get(ANSWERS)
    lost = dict(zip(every, answers.mean().tolist())) if answers is not None else {}
    tied = _tied(plans, judged)
    best = min(tied, key=lambda plan: (lost.get(plan, 0.0), costs[plan]))

    after = f"of {len(plans)} cuts the best after {evidence.after}, " if evidence.after else ""
    by, rise = proposals.get(best, "an exchange of layers"), costs[best] - costs[whole]
    said = f"{after}proposed by {by}; on unseen text it costs {rise:.4f} by {evidence.judging}"
    if lost and len(tied) > 1:
        said += f", and of {len(tied)} that noise does not tell apart it loses the fewest answers"
    names = {plan: spell(plan.dropped) if evidence.after else proposals[plan] for plan in plans}
    told = {
        "repaired" if evidence.after else "costs": {names[each]: round(costs[each] - costs[whole], 6) for each in plans}
    }
    if lost:
        told["answers"] = {names[each]: round(lost[each], 6) for each in plans}
    return Choice(best, said, told)


def _tied(plans: Sequence[Plan], judged: Losses) -> list[Plan]:
    """Those of ``plans`` that cost less than one standard error more than the cheapest; and that one.

    Args:
        judged: the whole model's losses, and theirs.
    """
    costs = judged.mean()
    least = 1 + int(costs[1:].argmin())
    errors = judged.errors(least)
    rows = enumerate(plans, 1)
    return [plan for row, plan in rows if row == least or costs[row] - costs[least] < errors[row]]


def _finalists(seen: Mapping[Plan, float], proposed: Sequence[Plan]) -> list[Plan]:
    """Greedy's proposal, which is the last, and those that cost least as they are cut."""
    order = sorted(seen, key=lambda plan: (plan != proposed[-1], seen[plan], plan.dropped))
    return order[:FINALISTS]


def _exchanged(plan: Plan, free: set[int], evidence: Evidence, seen: dict[Plan, float]) -> Plan:
    for _ in range(ROUNDS):
        others = [
            Plan(plan.layers, tuple({*plan.dropped, into} - {out}))
            for out in plan.dropped
            for into in sorted(free - set(plan.dropped))
        ]
        if not others:
            return plan
        losses = evidence.ranked([plan, *others])
        seen |= zip([plan, *others], losses.tolist())
        if losses.argmin() == 0:
            return plan
        plan = [plan, *others][int(losses.argmin())]
    return plan
