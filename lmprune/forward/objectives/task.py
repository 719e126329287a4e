"""``task:NAME``: cross-entropy of the right answers of a task of the harness, on documents that it is not tested on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmprune.forward.objectives.loss import CrossEntropy
from lmprune.text.tokens import Tokens

if TYPE_CHECKING:
    from lmprune.forward.objectives import Sources


def tokens(sources: Sources, argument: str) -> Tokens:
    """Questions, with the answers as what counts."""
    return sources.gold(argument)


def score(tokens: Tokens) -> CrossEntropy:
    """By cross-entropy."""
    return CrossEntropy(tokens)
