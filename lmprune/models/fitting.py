"""Plans that a runtime runs rightly, as near as possible to one that it does not. Pure.

Which layer may stand at which new number is a matter of two neighbours alone, so the nearest plans are found by dynamic
programming over the layers, without trying all of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping
from typing import Any

from lmprune.cuts.plan import Plan
from lmprune.errors import LmpruneError, PlanError
from lmprune.models.carrying import cut_config
from lmprune.models.readings import KINDS, Period
from lmprune.models.runtimes import WRONG, check, rules_for

MOST = 32
"""Plans that are looked at."""


def fits(config: Mapping[str, Any], plan: Plan, runtime: str) -> bool:
    """Whether ``runtime`` treats what ``plan`` leaves of that resolved config as it is, without a key being added."""
    try:
        (verdict,) = check(cut_config(config, plan), [runtime])
    except LmpruneError:  # no config can describe it
        return False
    return verdict.verdict != WRONG and not verdict.keys


def require_loading(config: Mapping[str, Any], runtime: str) -> None:
    """Refuse a model that ``runtime`` does not load, whole or cut.

    Raises:
        PlanError: why.
    """
    (whole,) = check(config, [runtime])
    if not whole.loads:
        raise PlanError(f"{whole.of('this model')}. Dropping layers does not change that")


def nearest_fitting(
    config: Mapping[str, Any], plan: Plan, runtime: str, protected: Collection[int] = (), most: int = MOST
) -> list[Plan]:
    """Plans that drop as many layers as ``plan`` and that `fits`, those first that have the most in common with it.

    Raises:
        PlanError: there is none; names the nearest numbers of layers of which there are.
    """
    require_loading(config, runtime)
    found = _found(config, plan, runtime, protected, len(plan.dropped), most)
    if found:
        return found
    counts = sorted(range(1, plan.layers), key=lambda count: abs(count - len(plan.dropped)))
    others = (n for n in counts if _found(config, plan, runtime, protected, n, 1))
    near = [n for _, n in zip(range(2), others)]
    advice = f"Drop {' or '.join(map(str, sorted(near)))}" if near else f"Leave --runtime {runtime} out"
    raise PlanError(f"no cut of {len(plan.dropped)} of {plan.layers} layers keeps what {runtime} expects. {advice}")


def _found(
    config: Mapping[str, Any], plan: Plan, runtime: str, protected: Collection[int], count: int, most: int
) -> list[Plan]:
    left = plan.layers - count
    inner = config.get("text_config") if isinstance(config.get("text_config"), Mapping) else config
    assert isinstance(inner, Mapping)
    wanted = []
    for rule in rules_for(config, runtime):
        if isinstance(rule.how, Period) and (kinds := KINDS[rule.how.of][0](inner)) is not None:
            wanted.append((kinds, rule.how.pattern(inner, left)))
    # By the number of layers kept so far: (layers dropped that the plan keeps, what is dropped), the best few.
    best: dict[int, list[tuple[int, tuple[int, ...]]]] = {0: [(0, ())]}
    for layer in range(plan.layers):
        following: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
        for kept, ways in best.items():
            if kept < left and all(kinds[layer] == pattern[kept] for kinds, pattern in wanted):
                following.setdefault(kept + 1, []).extend(ways)
            if layer not in protected and layer - kept < count:
                other = layer not in plan.dropped
                following.setdefault(kept, []).extend((cost + other, (*gone, layer)) for cost, gone in ways)
        best = {kept: heapq.nsmallest(most, ways) for kept, ways in following.items()}
    plans = [Plan(plan.layers, gone) for _, gone in best.get(left, ())]
    return [found for found in plans if fits(config, found, runtime)]
