"""The objectives: by what a cut is judged. Each says on which tokens, and how the logits there are scored.

An objective is one file with two functions and one line in `OBJECTIVES`: ``tokens(sources, argument)`` and
``score(tokens)``, whose `Score` turns the logits of a batch into one number a sample, in nats summed over its counted
tokens, lower being better. Several are mixed by weights: ``loss+self``, ``2*loss+task:gsm8k``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar, Protocol

from lmprune.errors import UsageError, nearest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from lmprune.forward.batches import Batch
    from lmprune.text.tokens import Tokens


class Sources(Protocol):
    """Where tokens may come from: one half of the samples, on which is chosen or judged, and never both."""

    def text(self) -> Tokens:
        """Calibration text."""

    def written(self) -> Tokens:
        """What the whole model writes to prompts from that text."""

    def sure(self) -> Tokens:
        """First lines of that, as far as the whole model is sure of them."""

    def gold(self, task: str) -> Tokens:
        """The right answers of a task of the harness."""


class Score(Protocol):
    """How logits are scored."""

    whole: ClassVar[bool]
    """Whether it must see the whole model's logits of a batch first, by `learn`."""

    def knows(self, sample: int) -> bool:
        """Whether `learn` has seen that sample."""

    def learn(self, samples: Sequence[int], batch: Batch, logits: Tensor) -> None:
        """Keep what is needed of the whole model's logits (samples, length, vocabulary)."""

    def __call__(self, samples: Sequence[int], batch: Batch, logits: Tensor) -> NDArray[np.float64]:
        """(samples,) nats, summed over each sample's counted tokens."""


class Objective(Protocol):
    """An objective. A module with two such functions is one."""

    def tokens(self, sources: Sources, argument: str) -> Tokens:
        """What it is measured on; ``argument`` is what stands behind the colon."""

    def score(self, tokens: Tokens) -> Score:
        """How."""


OBJECTIVES = {"loss": "loss", "kl": "kl", "self": "written", "answers": "answers", "task": "task"}
"""What goes by which name: a file here, imported when it is used, so that a name is known without torch."""
ARGUMENTS = {"task": "NAME"}
"""Objectives that want something behind a colon."""
SPELLING = "loss, kl, self, answers, task:NAME, or a sum of them such as loss+self or 2*loss+kl"


@dataclass(frozen=True)
class Term:
    """One objective of a mix, and its share: the shares of a mix sum to 1."""

    name: str
    argument: str = ""
    share: float = 1.0

    @property
    def spelled(self) -> str:
        """As it is asked for."""
        return f"{self.name}:{self.argument}" if self.argument else self.name

    def tokens(self, sources: Sources) -> Tokens:
        """What it is measured on."""
        found: Tokens = self._objective.tokens(sources, self.argument)
        return found

    def score(self, tokens: Tokens) -> Score:
        """How it is measured."""
        make: Callable[[Tokens], Score] = self._objective.score
        return make(tokens)

    @property
    def _objective(self) -> Objective:
        found: Objective = import_module(f"{__name__}.{OBJECTIVES[self.name]}")
        return found


def parse_objective(text: str) -> tuple[Term, ...]:
    """The terms of ``loss``, ``task:NAME``, ``loss+self``, ``2*loss+kl``; their shares are the weights over their sum.

    >>> [(term.spelled, term.share) for term in parse_objective("3*loss+self")]
    [('loss', 0.75), ('self', 0.25)]

    Raises:
        UsageError: it is no objective (names the nearest), or one is named twice.
    """
    found: list[tuple[float, str, str]] = []
    for word in text.split("+"):
        match = re.fullmatch(r"\s*(?:(\d+(?:\.\d+)?)\s*\*)?\s*([\w-]+)(?::(\S+))?\s*", word)
        weight, name, argument = (float(match[1] or 1), match[2], match[3] or "") if match else (1.0, word.strip(), "")
        if match is None or name not in OBJECTIVES:
            raise UsageError(
                f"--objective {text!r}: there is no objective {name!r}{nearest(name, OBJECTIVES)}. Give {SPELLING}"
            )
        if bool(argument) != (name in ARGUMENTS):
            wanted = f"{name}:{ARGUMENTS[name]}" if name in ARGUMENTS else name
            raise UsageError(f"--objective {text!r}: write {wanted}. Give {SPELLING}")
        if weight <= 0:
            raise UsageError(f"--objective {text!r}: a weight is above 0, not {weight:g}")
        if any((name, argument) == other[1:] for other in found):
            raise UsageError(f"--objective {text!r}: {word.strip()!r} is named twice")
        found.append((weight, name, argument))
    whole = sum(weight for weight, *_ in found)
    return tuple(Term(name, argument, weight / whole) for weight, name, argument in found)
