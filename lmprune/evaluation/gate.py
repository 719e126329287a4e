"""The reasoning gate: does a cut keep what the model knows and lose what it can work out? Pure.

Layer pruning breaks chains of steps long before it breaks knowledge (arXiv 2510.22228, 2602.01997), so a score on
questions with given answers says nothing about reasoning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from lmprune.errors import UsageError
from lmprune.evaluation.rows import Score
from lmprune.settings import option


@dataclass(frozen=True)
class Gate:
    """Knowledge holds at or above ``holds`` of the unpruned model's; reasoning falls below ``falls`` of it.

    Both count from what guessing gives, so that a model that guesses keeps nothing.
    """

    PANEL: ClassVar[str] = "Reasoning gate"

    holds: float = option(
        0.9, "Reasoning gate: share of knowledge from which it holds.", metavar="F", flag="--knowledge-holds"
    )
    falls: float = option(
        0.8, "Reasoning gate: share of reasoning below which it has fallen.", metavar="F", flag="--reasoning-falls"
    )

    def __post_init__(self) -> None:
        for name, value in (("knowledge-holds", self.holds), ("reasoning-falls", self.falls)):
            if not 0 < value <= 1:
                raise UsageError(f"--{name} {value}: give a share above 0, up to 1")

    def judge(self, whole: Mapping[str, Score], cut: Mapping[str, Score]) -> Verdict:
        """What of ``whole``'s scores is left in ``cut``'s."""
        knowledge = _kept(whole, cut, (name for name, score in whole.items() if score.choice))
        reasoning = _kept(whole, cut, (name for name, score in whole.items() if score.generative))
        return Verdict(knowledge, reasoning, self)


@dataclass(frozen=True)
class Share:
    """What is left of the unpruned model's scores above chance, and the standard error of that."""

    value: float
    error: float

    def beyond(self, limit: float) -> bool | None:
        """Whether it is at or above ``limit``; None where the noise does not let that be said."""
        if abs(self.value - limit) < SURE * self.error:
            return None
        return self.value >= limit

    def __str__(self) -> str:
        noise = f" ± {round(100 * self.error)}" if round(100 * self.error) else ""
        return f"{round(100 * self.value)}{noise} %"


SURE = 1.96
"""Standard errors beyond which a difference is no noise: 95 % of a normal distribution lies within them."""


@dataclass(frozen=True)
class Verdict:
    """Shares of the unpruned model's scores that are left; None where it has none above chance."""

    knowledge: Share | None
    reasoning: Share | None
    gate: Gate

    @property
    def holds(self) -> bool | None:
        """Whether both knowledge and reasoning hold; None where nothing is known, or where noise hides it."""
        if self.knowledge is None or self.reasoning is None:
            return None
        both = self.knowledge.beyond(self.gate.holds), self.reasoning.beyond(self.gate.falls)
        return False if False in both else None if None in both else True

    @property
    def warns(self) -> bool:
        """Whether reasoning has fallen, and knowledge has not, for all that is known."""
        return (
            self.knowledge is not None
            and self.reasoning is not None
            and self.knowledge.beyond(self.gate.holds) is not False
            and self.reasoning.beyond(self.gate.falls) is False
        )

    def sentence(self, what: str, more: str = "") -> str:
        """One plain sentence on ``what``, such as "dropping 3 of 12 layers"; ``more`` is said of it at the end."""
        if self.knowledge is None or self.reasoning is None:
            return f"{what}: the unpruned model is no better than guessing on these tasks, so nothing can be said."
        left = f"keeps {self.knowledge} of its knowledge and {self.reasoning} of its reasoning"
        if self.warns:
            return f"{what} {left}: do not use it where steps must be worked out."
        if self.holds is None:
            return f"{what} {left}: within the noise of so few documents, so that is no verdict."
        return f"{what} {left}, {more}." if more else f"{what} {left}."


def _kept(whole: Mapping[str, Score], cut: Mapping[str, Score], names: Iterable[str]) -> Share | None:
    """Mean share above chance that is left, at least 0; tasks on which the whole model only guesses do not count.

    Both models' noise counts as if they had answered different documents: they answer the same ones, and what they have
    in common makes the true noise smaller.
    """
    shares = []
    for name in names:
        if name not in cut or whole[name].value - whole[name].chance <= 2 * whole[name].noise:
            continue
        above = whole[name].value - whole[name].chance
        share = max(0.0, (cut[name].value - cut[name].chance) / above)
        shares.append((share, math.hypot(cut[name].noise, share * whole[name].noise) / above))
    if not shares:
        return None
    count = len(shares)
    return Share(sum(share for share, _ in shares) / count, math.hypot(*(error for _, error in shares)) / count)
