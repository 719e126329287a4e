"""ReplaceMe: one linear map before each cut, folded into the `down_proj` there (arXiv 2505.02819).

With m what the last MLP before the cut adds to the stream, x what it leaves and y what enters the first layer after the
cut in the whole model, T is the least-squares map of m to y - x + m, and m T is what the MLP writes afterwards:
W_down <- T' W_down. The published code counts padding as text; here it is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lmprune.cuts.plan import Plan
from lmprune.errors import ModelError, PlanError
from lmprune.forward.streaming import OneByOne
from lmprune.healing.fitting import Parts, fitted
from lmprune.healing.keeping import Kept
from lmprune.healing.layerwise import Shelf
from lmprune.healing.readers import Readers
from lmprune.healing.refitting import Outcome, RefitReport, Sequential, Solver, evaluated
from lmprune.healing.solving import ZERO
from lmprune.healing.writers import Stage, Writer, set_weight, weight_of

_RIDGE = 1e-6
"""In units of the mean squared output of the MLP: enough for the solve."""


def replaceme(
    student: nn.Module | OneByOne,
    whole: nn.Module | OneByOne,
    plan: Plan,
    blocks: NDArray[np.int32] | Sequence[NDArray[np.int32]],
    *,
    say: Callable[[str], None] = lambda text: None,
    kept: Kept | None = None,
) -> RefitReport:
    """Fold a map into the live ``student`` before each cut, in place; arguments as those of `refit`.

    Raises:
        PlanError: the first layer is gone, so that there is none before the cut.
        DataError, ModelError, UsageError: as `refit`, and where a norm follows the projection.
    """
    if 0 in plan.dropped:
        raise PlanError("replaceme changes the layer before each cut, and this cut starts at layer 0. Use refit")
    repair = _ReplaceMe(plan)
    with evaluated(student), evaluated(whole), torch.no_grad():
        return repair.run(student, whole, list(blocks), say, kept)


class _ReplaceMe(Sequential):
    def solved(self, place: int, stages: Sequence[Stage]) -> Sequence[Stage]:
        return stages[-1:] if self._plan.kept[place] + 1 in self._plan.dropped else ()

    def solver(self, layer: nn.Module, writer: Writer, parts: Parts) -> Solver:
        if writer.experts:
            raise ModelError(f"{writer.path} are experts, each of which would need a map of its own. Use refit")
        if writer.norm:
            raise ModelError(f"a norm follows {writer.path}, into which no map can be folded. Use refit")
        return _Folded(writer.linear(layer), parts)

    def before_cut(self, place: int, stages: Sequence[Stage], target: Shelf) -> None:
        """One map is all."""

    def readers(self, place: int, group: Readers, inputs: Shelf) -> None:
        """They stay: a narrower stream is refused."""

    def after_layers(self) -> None:
        """Nothing changes there."""

    def is_over(self, place: int, idle: int) -> bool:
        return place > self._last_gap


class _Folded:
    def __init__(self, linear: nn.Module, parts: Parts) -> None:
        self._linear, self._parts = linear, parts

    def solve(self, *, all_text: bool = True) -> Outcome:
        def parts(held: bool) -> Iterator[tuple[Tensor, Tensor]]:
            return ((self._linear(inputs), wanted) for inputs, wanted in self._parts(held))

        old = weight_of(self._linear)
        found = fitted(parts, torch.eye(old.shape[1]).double(), (_RIDGE,), bias=False, forms=(ZERO,))
        if found.ridge is None:  # too little text, or none that says more than the weight knows
            return found.outcome
        set_weight(self._linear, old @ found.weight)
        return "folded", _RIDGE, found.before, found.after, found.tokens
