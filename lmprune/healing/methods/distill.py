"""The unpruned model teaches: its likeliest tokens, and the hidden states that its layers hand on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lmprune.cuts.plan import Plan
from lmprune.errors import UsageError
from lmprune.healing.methods.base import Teaching, above_zero, narrows_stream, not_negative
from lmprune.settings import option

if TYPE_CHECKING:
    from torch import nn

    from lmprune.healing.teacher import Teacher, TeacherApart


@dataclass(frozen=True)
class Distill(Teaching):
    """Weights of the terms of `lmprune.healing.teacher.Teacher.loss`."""

    kl: float = option(1.0, "distill: weight of the KL divergence to the unpruned model.")
    hard: float = option(1.0, "distill: weight of the true next token.")
    aux: float = option(0.0, "distill: weight of the hidden state after the cut (eq. 8).")
    states: float = option(0.0, "distill: weight of the hidden states that enter all layers after the cut.")
    temperature: float = option(1.0, "distill: softens both distributions.")
    top_k: int = option(64, "distill: teacher's likeliest tokens; the rest is one outcome; 0 is all.")

    alone: ClassVar[str] = "lora"
    one_process: ClassVar[str | None] = "distill swaps layers in and out"
    needs_base: ClassVar[bool] = True

    def check(self, method: str) -> None:
        """As in `Options`."""
        above_zero(self, "temperature")
        not_negative(self, "kl", "hard", "aux", "states", "top_k")
        if not self.kl + self.hard + self.aux + self.states:
            raise UsageError(
                "--kl, --hard, --aux and --states are all 0, so there is nothing to learn. Give one a weight"
            )

    def check_model(self, model: nn.Module, cut: Plan | None) -> None:
        """States are compared where there are some to compare.

        Raises:
            UsageError: those of the two models differ in size, or ``aux`` finds no dropped layer.
        """
        flag = "--aux" if self.aux else "--states" if self.states else ""
        if cut is None or not flag:
            return
        if narrows_stream(cut):
            raise UsageError(
                f"{flag}: the narrowed model's hidden state has another size than the teacher's. Leave it out"
            )
        if self.aux and not cut.dropped:
            raise UsageError("--aux compares the states behind dropped layers, and none is dropped. Leave it out")

    def take_apart(self, whole: Any, plan: Plan) -> Teacher:
        """The dropped layers are kept for the teacher."""
        from lmprune.healing.teacher import Teacher

        return Teacher.take_apart(whole, plan, self)

    def apart(self, whole: Any, plan: Plan) -> TeacherApart:
        """The whole model stays beside the student."""
        from lmprune.healing.teacher import TeacherApart

        return TeacherApart(whole.eval().requires_grad_(False), self, plan)
