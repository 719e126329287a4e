"""The reasoning gate: does a cut keep what the model knows and lose what it can work out? Pure.

Layer pruning breaks chains of steps long before it breaks knowledge (arXiv 2510.22228, 2602.01997), so a score on
questions with given answers says nothing about reasoning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lmprune.errors import UsageError
from lmprune.evaluation.rows import Score


@dataclass(frozen=True)
class Gate:
    """Knowledge holds at or above ``holds`` of the unpruned model's; reasoning falls below ``falls`` of it.

    Both count from what guessing gives, so that a model that guesses keeps nothing.
    """

    holds: float = 0.9
    falls: float = 0.8

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
class Verdict:
    """Shares of the unpruned model's scores that are left; None where it has none above chance."""

    knowledge: float | None
    reasoning: float | None
    gate: Gate

    @property
    def warns(self) -> bool:
        """Whether knowledge holds and reasoning falls."""
        return (
            self.knowledge is not None
            and self.reasoning is not None
            and self.knowledge >= self.gate.holds
            and self.reasoning < self.gate.falls
        )

    def sentence(self, what: str, more: str = "") -> str:
        """One plain sentence on ``what``, such as "dropping 3 of 12 layers"; ``more`` is said of it at the end."""
        if self.knowledge is None or self.reasoning is None:
            return f"{what}: the unpruned model is no better than guessing on these tasks, so nothing can be said."
        left = f"keeps {_percent(self.knowledge)} of its knowledge and {_percent(self.reasoning)} of its reasoning"
        if self.warns:
            return f"{what} {left}: do not use it where steps must be worked out."
        return f"{what} {left}, {more}." if more else f"{what} {left}."


def _percent(share: float) -> str:
    return f"{round(100 * share)} %"


def _kept(whole: Mapping[str, Score], cut: Mapping[str, Score], names: Iterable[str]) -> float | None:
    """Mean share above chance that is left, at least 0; tasks on which the whole model only guesses do not count."""
    shares = [
        max(0.0, (cut[name].value - cut[name].chance) / (whole[name].value - whole[name].chance))
        for name in names
        if name in cut and whole[name].value - whole[name].chance > 2 * (whole[name].stderr or 0.0)
    ]
    return sum(shares) / len(shares) if shares else None
