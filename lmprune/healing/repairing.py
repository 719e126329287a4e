"""What a closed-form repair works on: the cut and the whole model, live, and what passes through them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lmprune.cuts.plan import Plan
from lmprune.errors import UsageError
from lmprune.forward.batches import Batch
from lmprune.forward.calls import decoder_of, entering, evaluating, leaving, run_decoder
from lmprune.forward.loss import held_out_loss
from lmprune.healing.keeping import Kept
from lmprune.models.stack import find_stack

_BATCH = 8


@dataclass(frozen=True)
class Point:
    """A place whose values can be had: what enters the module at ``path`` of the whole or of the cut model.

    ``leaves`` says that it is what leaves the module instead.
    """

    whole: bool
    path: str
    leaves: bool = False


@dataclass
class Repair:
    """Two live models on one device, in float32 as all their tensors.

    Attributes:
        student: the cut model, in eval mode. Changes to its weights count at once.
        whole: the unpruned model, in eval mode.
        plan: what is missing from the whole model.
        calibration: real token ids to fit on, (blocks, length).
        held_out: token ids that the result is measured on, (blocks, length): for choosing nothing but by their loss.
        unscored: a token that their loss does not ask for.
        maps: what a `Patching` has found: the tensors of a patch's file.
        kept: where layers are kept once they are solved, for a run that is killed; None where nothing is.
    """

    student: Any
    whole: Any
    plan: Plan
    calibration: NDArray[np.int32]
    held_out: NDArray[np.int32]
    unscored: int | None = None
    maps: Mapping[str, Tensor] | None = None
    kept: Kept | None = None

    def layer(self, place: int) -> str:
        """The dotted path of layer ``place`` of the cut model."""
        stack = find_stack(self.student)
        if not 0 <= place < len(stack.layers):
            raise UsageError(f"no layer {place}: the cut model has layers 0 to {len(stack.layers) - 1}")
        return f"{stack.path}.{place}"

    def student_state(self, place: int) -> Point:
        """What enters layer ``place`` of the cut model; the number of layers stands for what leaves the last."""
        return _state(self.student, place, whole=False)

    def whole_state(self, place: int) -> Point:
        """The same of the whole model, in its own numbers."""
        return _state(self.whole, place, whole=True)

    def student_input(self, path: str) -> Point:
        """What enters the module at the dotted ``path`` of the cut model, such as a ``down_proj``."""
        self.student.get_submodule(path)
        return Point(False, path)

    def whole_input(self, path: str) -> Point:
        """The same of the whole model."""
        self.whole.get_submodule(path)
        return Point(True, path)

    def batches(self, *points: Point) -> Iterator[tuple[Tensor, ...]]:
        """Values at ``points``, (tokens, width) each, for the same tokens of the calibration, batch by batch.

        Each model runs once for a batch, and no further than the last of its points.
        """
        for at in range(0, len(self.calibration), _BATCH):
            rows = list(self.calibration[at : at + _BATCH])
            found: dict[Point, Tensor] = {}
            for whole, model in ((False, self.student), (True, self.whole)):
                mine = [point for point in points if point.whole == whole]
                if mine:
                    found |= _passing(model, mine, rows)
            yield tuple(found[point] for point in points)

    def held_out_loss(self) -> float:
        """The student's loss now, in nats per token."""
        return held_out_loss(self.student, self.held_out, batch=_BATCH, unscored=self.unscored)

    def say(self, text: str) -> None:
        """Tell the user."""
        logging.getLogger("lmprune").info(text)


def _state(model: nn.Module, place: int, *, whole: bool) -> Point:
    stack = find_stack(model)
    count = len(stack.layers)
    if not 0 <= place <= count:
        raise UsageError(f"no state {place}: this model has states 0 to {count}")
    return Point(whole, f"{stack.path}.{min(place, count - 1)}", leaves=place == count)


@torch.no_grad()
def _passing(model: Any, points: list[Point], rows: list[NDArray[np.int32]]) -> dict[Point, Tensor]:
    batch, found = Batch.of(rows, model.device), {}

    def take(point: Point, value: Tensor) -> None:
        found[point] = value.reshape(-1, value.shape[-1]).float()

    with evaluating(model), ExitStack() as hooks:
        for point in points:
            module = model.get_submodule(point.path)
            hooks.enter_context((leaving if point.leaves else entering)(module, partial(take, point)))
        run_decoder(decoder_of(model), batch)
    return found
