"""Let the others propose, mend the best proposals by exchanging layers, and judge on text that none of them saw.

Ours. Proposals: the angular block, the best segment, one-shot and greedy. From the two that cost least, the exchange
tries every pair of a dropped and a kept layer, and goes on while that lowers the loss. With a repair (``--after``) the
cuts that cost least of all that were looked at, and greedy's, which sees the repair already, are repaired, and judged
as they are then: the order changes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lmprune.criteria import angular, greedy, one_shot, segment
from lmprune.criteria.evidence import Choice, Evidence, may_go
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
JUDGED_BY = "loss+self+answers"
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
    if evidence.after is not None:
        return _repaired(proposals, _finalists(seen, first), evidence)
    plans = list(proposals)
    judged = evidence.judged([Plan(evidence.layers), *plans]).mean()
    best = plans[int(judged[1:].argmin())]
    rise = float(judged[1:].min() - judged[0])
    said = f"proposed by {proposals[best]}; on unseen text it costs {rise:.4f} by {evidence.judging}"
    table = {name: round(float(loss - judged[0]), 6) for (_, name), loss in zip(proposals.items(), judged[1:])}
    return Choice(best, said, {"costs": table})


def _finalists(seen: Mapping[Plan, float], proposed: Sequence[Plan]) -> list[Plan]:
    """Greedy's proposal, which is the last, and those that cost least as they are cut."""
    order = sorted(seen, key=lambda plan: (plan != proposed[-1], seen[plan], plan.dropped))
    return order[:FINALISTS]


def _repaired(proposals: Mapping[Plan, str], last: Sequence[Plan], evidence: Evidence) -> Choice:
    """The finalist that costs least once it is repaired."""
    whole = float(evidence.judged([Plan(evidence.layers)]).mean()[0])
    rises = {plan: float(evidence.repaired(plan).judged([plan]).mean()[0]) - whole for plan in last}
    best = min(last, key=lambda plan: rises[plan])
    by = proposals.get(best, "an exchange of layers")
    said = (
        f"of {len(last)} cuts the best after {evidence.after}, proposed by {by}; on unseen text it then costs "
        f"{rises[best]:.4f} by {evidence.judging}"
    )
    return Choice(best, said, {"repaired": {spell(plan.dropped): round(rise, 6) for plan, rise in rises.items()}})


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
