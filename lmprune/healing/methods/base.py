"""What a healing method is: a frozen dataclass whose fields are its options, and what it does to a cut model. Pure.

There are two kinds. A `Training` prepares parameters, which then train. A `Repairing` changes the weights itself, by a
closed form, and nothing trains. A `Teaching` is no method of its own: it is joined to one that trains, as in
``full+distill``. A method imports torch in its functions only: the command line reads the options of all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from lmprune.cuts.plan import Plan
from lmprune.errors import UsageError, VerifyError
from lmprune.settings import Quantization, check_choice, option

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmprune.healing.facts import Facts
    from lmprune.healing.repairing import Repair

SCHEDULES = ("cosine", "linear", "constant_with_warmup")


@dataclass(frozen=True)
class Options:
    """Options of a method: fields made by `option`, with the defaults of whoever asks for it by name.

    A default of None stands for one that follows from other values; `__post_init__` puts it there.
    """

    one_process: ClassVar[str | None] = None
    """Why FSDP cannot follow; None where it can."""
    needs_base: ClassVar[bool] = False
    """Whether the unpruned model is needed."""

    def check(self, method: str) -> None:
        """Make sure that every value makes sense; ``method`` is what the user chose.

        Raises:
            UsageError: naming the first that does not.
        """

    def check_model(self, model: nn.Module, cut: Plan | None) -> None:
        """Make sure that it fits the cut model, which may be one without weights.

        Raises:
            UsageError, ModelError: it does not.
        """

    def to_data(self) -> dict[str, Any]:
        """The options as plain data."""
        return asdict(self)

    def _settle(self, name: str, value: Any) -> None:
        """Give a field that is still None its value."""
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Method(Options, ABC):
    """What both kinds share: the text that they read."""

    max_length: int = option(256, "Tokens per block.")
    eval_blocks: int = option(64, "Held-out blocks.")

    adapter: ClassVar[bool] = False
    """Whether it makes a LoRA adapter and leaves the weights alone."""

    @classmethod
    def defaults(cls, facts: Facts) -> dict[str, Any]:
        """Defaults that depend on the model."""
        return {}

    @property
    @abstractmethod
    def blocks(self) -> int:
        """Blocks of text that it wants, besides the held-out ones."""

    @property
    def quantization(self) -> Quantization | None:
        """In how few bits the cut model is loaded."""
        return None

    def check(self, method: str) -> None:
        """As in `Options`."""
        above_zero(self, "max_length", "eval_blocks")
        if self.max_length < 2:
            raise UsageError(f"--max-length {self.max_length}: predicting a token needs one before it; give 2 or more")

    def prepare(self, model: nn.Module, cut: Plan | None, seed: int) -> tuple[nn.Module, list[str]]:
        """``model`` with what is to change marked by ``requires_grad``, and what the user should be told.

        All of it is frozen when this is called. What changes is put into float32 afterwards.
        """
        model.requires_grad_(True)
        return model, []

    def merge(self, student: nn.Module | None, merging: Merging) -> tuple[Any, Agreement]:
        """The cut model in its own type with what ``student`` has learnt, and the proof that it does the same.

        Of a method that makes an adapter that is in its folder already, and ``student`` is None.
        """
        assert student is not None
        return merging.take_over(student)


@dataclass(frozen=True)
class Training(Method):
    """A method whose `prepare` marks parameters that then train."""

    steps: int = option(300, "Optimizer steps.")
    batch_size: int = option(16, "Blocks per step, over all devices.")
    lr: float = option(None, "Peak learning rate.")
    warmup: int = option(10, "Warm-up steps.")
    schedule: str = option("cosine", f"Learning rate after it: {', '.join(SCHEDULES)}.")
    weight_decay: float = option(0.0, "AdamW's weight decay.")
    eval_every: int = option(None, "Steps between evaluations, each with a checkpoint. Default: a tenth of all.")

    rate: ClassVar[float] = 1e-3
    """Peak learning rate of a small model: a starting value, not yet swept."""

    def __post_init__(self) -> None:
        self._settle("lr", self.rate)
        self._settle("eval_every", max(1, self.steps // 10))

    @classmethod
    def defaults(cls, facts: Facts) -> dict[str, Any]:
        """The learning rate: large models were trained at smaller ones."""
        return {"lr": cls.rate / (10 if facts.grown else 1)}

    @property
    def blocks(self) -> int:
        """One for each place in each batch."""
        return self.steps * self.batch_size

    @property
    def lighter(self) -> str | None:
        """The method to use where memory is too short for this one; None where there is none."""
        return "qlora"

    def check(self, method: str) -> None:
        """As in `Options`."""
        super().check(method)
        above_zero(self, "steps", "batch_size", "lr", "eval_every")
        not_negative(self, "warmup", "weight_decay")
        check_choice("--schedule", self.schedule, SCHEDULES)


@dataclass(frozen=True)
class Repairing(Method):
    """A method that changes weights by itself, in place, on a live model in float32; their shapes stay."""

    fit_blocks: int = option(640, "Blocks of text that a closed form is fitted on, where there are so many.")

    one_process: ClassVar[str | None] = "it is solved in one process"
    needs_base: ClassVar[bool] = True
    streams: ClassVar[bool] = False
    """Whether it works on a `lmprune.forward.streaming.OneByOne` in place of each live model as well."""

    @property
    def blocks(self) -> int:
        """As many as asked for."""
        return self.fit_blocks

    def check(self, method: str) -> None:
        """As in `Options`."""
        super().check(method)
        above_zero(self, "fit_blocks")

    @abstractmethod
    def repair(self, work: Repair) -> Mapping[str, Any] | None:
        """Change weights of ``work.student``; what is worth keeping in ``lmprune.json``, as plain data."""


@dataclass(frozen=True)
class Patching(Repairing):
    """A repair that leaves the weights alone: maps of the state before each cut, beside a new recipe."""

    @property
    def numbers(self) -> int:
        """Dimensions of each map: 2 for one of width times width, 1 for one factor a channel."""
        return 2

    def check_model(self, model: Any, cut: Plan | None) -> None:
        """There must be a layer before the cut."""
        if cut is not None and 0 in cut.dropped:
            raise UsageError(
                "a patch stands behind the layer before each cut, and this one starts at layer 0. Use refit"
            )

    def repair(self, work: Repair) -> Mapping[str, Any] | None:
        """Find the maps and put them into the live student.

        Raises:
            DataError: there is too little text.
        """
        from lmprune.healing.patching import put_into

        sizes = [model.config.get_text_config().hidden_size for model in (work.student, work.whole)]
        if sizes[0] != sizes[1]:
            raise UsageError(
                f"a patch maps states of width {sizes[1]}, and this cut narrows them to {sizes[0]}. Use refit"
            )
        maps, noted = self.maps(work)
        put_into(work.student, work.plan, maps)
        work.maps = maps
        return noted

    @abstractmethod
    def maps(self, work: Repair) -> tuple[Mapping[str, Tensor], Mapping[str, Any] | None]:
        """The tensors of a patch's file, and what is worth keeping as of `repair`."""


@dataclass(frozen=True)
class Teaching(Options, ABC):
    """Joined to a method that trains: takes the place of the loss of the next token."""

    alone: ClassVar[str]
    """The method that it is joined to where it stands alone."""

    @abstractmethod
    def take_apart(self, whole: nn.Module, plan: Plan) -> Teacher:
        """Cut the whole model, in place, into the student; what is made teaches it."""

    @abstractmethod
    def apart(self, whole: nn.Module, plan: Plan) -> Teacher:
        """What teaches a student that shares no modules with the whole model."""


class Teacher(Protocol):
    """What a `Teaching` makes of the whole model."""

    def freeze_twins(self, student: Any, *, adapter: bool) -> None:
        """Called once, when the student is prepared and before it trains; ``adapter`` as in `Method`."""

    def loss(
        self,
        model: nn.Module,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """The loss of ``model``, the student as the trainer wraps it, on ids (batch, length), a mean over tokens.

        ``position_ids`` are given where documents are kept apart.
        """


@dataclass(frozen=True)
class Agreement:
    """How far the merged model's logits are from those of the model that was trained.

    ``rounding`` is how far those of the written model are from the merged one's: what its type does to these logits.
    """

    relative_distance: float
    tolerance: float
    rounding: float

    def require(self, remedy: str) -> None:
        """Raise a disagreement; ``remedy`` says what is left and what to do.

        Raises:
            VerifyError: the distance is beyond the tolerance.
        """
        if not self.relative_distance <= self.tolerance:
            raise VerifyError(
                f"the merged weights do not do what was trained: logits differ by {self.relative_distance:.2g} of "
                f"their spread, and {self.tolerance:.2g} is allowed. Nothing was written; {remedy}"
            )


class Merging(Protocol):
    """How what a method has changed comes into the cut model's own, unquantised weights."""

    def take_adapter(self) -> tuple[nn.Module, Agreement]:
        """The adapter that was kept merged into the weights, and the proof."""

    def take_over(self, student: nn.Module) -> tuple[nn.Module, Agreement]:
        """The weights that ``student`` has changed in place of the cut model's, and the proof."""


# --- checks ---------------------------------------------------------------------------------------------------------


def above_zero(options: Options, *names: str) -> None:
    """Make sure that each of these options is a number above 0."""
    for name in names:
        if not getattr(options, name) > 0:  # nor is nan
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)}: give a number above 0")


def not_negative(options: Options, *names: str) -> None:
    """Make sure that each of these options is 0 or more."""
    for name in names:
        if not getattr(options, name) >= 0:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)}: give 0 or more")


def narrows_stream(cut: Plan | None) -> bool:
    """Whether the hidden size is cut too, so that states have no counterpart in the unpruned model."""
    return cut is not None and any(getattr(part, "hidden", None) is not None for part in cut.parts)


def same_stream(cut: Plan | None, method: str) -> None:
    """Refuse a cut of the hidden size, of a method that compares states of one size.

    Raises:
        UsageError: it is one.
    """
    if narrows_stream(cut):
        raise UsageError(f"--method {method}: the hidden size was cut too, for which it cannot make up. Use refit")
