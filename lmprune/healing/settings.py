"""What a user may say about a healing run, and what is settled once a preset has filled the gaps. Pure: no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lmprune.errors import UsageError
from lmprune.healing.methods import Method, Repairing, Teaching, described, method_options
from lmprune.settings import check_shared, device_option, dtype_option, option, seed_option


@dataclass(frozen=True)
class _Choice:
    preset: str = option(
        "quick", "Where defaults come from: quick, gromov, review or reassessing.", metavar="PRESET", panel="Options"
    )
    method: str | None = option(None, f"{described()} Default: the preset's.", metavar="METHOD", panel="Options")
    repair_first: bool = option(
        True, "Let a preset repair before it trains.", flag="--repair-first/--no-repair-first", panel="Options"
    )


@dataclass(frozen=True)
class _Run:
    PANEL: ClassVar[str] = "Run"
    micro_batch_size: int | None = option(
        None,
        "Blocks that one device works on at once. Default: 4096 tokens' worth, or what fits.",
    )
    eval_data: str | None = option(None, "Held-out text. Default: documents of --data that never train.", metavar="SRC")
    budget: str | None = option(
        None,
        "Time that the whole run may take, as 90s, 5m or 1h30m: so many steps as fit. Default: --steps.",
        metavar="TIME",
    )
    document_mask: bool = option(
        False,
        "Keep the documents of a block apart, so that none reads another. Default: joined, as in pretraining.",
        flag="--document-mask/--no-document-mask",
    )
    patience: int | None = option(None, "Stop after this many evaluations without a better loss. Default: never.")
    seed: int = seed_option("Seed of data order, adapters and dropout.")
    gradient_checkpointing: bool = option(
        False, "Recompute activations to save memory.", flag="--gradient-checkpointing/--no-gradient-checkpointing"
    )
    dtype: str = dtype_option(
        "bfloat16, float32, or auto: bfloat16 on a GPU and where a CPU multiplies it, else float32."
    )
    device: str = device_option("cpu, cuda, cuda:1, or auto: a GPU where there is one.")
    report_to: str = option("none", "Trainer's loggers: none, tensorboard, wandb, trackio.")
    keep_adapter: bool = option(
        False, "Write the LoRA adapter alone instead of a merged checkpoint.", flag="--keep-adapter"
    )
    as_adapter: int | None = option(
        None, "Write a repair as a LoRA adapter of this rank instead of a checkpoint.", metavar="RANK"
    )
    stream: bool | None = option(
        None,
        "Read one layer at a time, for repairs of models larger than memory. Default: where they do not fit.",
        flag="--stream/--no-stream",
    )
    self_data: bool = option(
        False, "Train on text that the unpruned model writes to prompts from --data; cached.", flag="--self-data"
    )
    resume: bool = option(True, "Go on from an interrupted run of the same command.", flag="--resume/--no-resume")

    def __post_init__(self) -> None:
        check_shared(self, dtypes=("auto", "bfloat16", "float32"))
        if self.device == "mps":
            raise UsageError("--device mps: healing works on a GPU of CUDA or on the CPU. Give cuda or cpu")


if TYPE_CHECKING:

    class HealSettings(_Choice, _Run):
        """To mypy: also any option of any method, by its name."""

        def __init__(self, **given: Any) -> None: ...

else:

    @dataclass(frozen=True)
    class HealSettings(_Run, method_options(), _Choice):
        """The options of ``lmprune heal``: those of the run, and those of all methods, installed ones too.

        ``HealSettings(method="lora", rank=8)``; None leaves a value to the preset.
        """


@dataclass(frozen=True)
class Resolved:
    """Every choice of a healing run, settled.

    Attributes:
        method: as the user writes it: ``full+distill``.
        way: the method with its options.
        lesson: what is joined to it.
        first: the repair that comes before it.
        asked: whether that repair was asked for, by name or by an option of its own.
        alone: what is done instead where nobody asked for it, and it does not help or has no room.
    """

    preset: str
    method: str
    way: Method
    lesson: Teaching | None
    seed: int
    first: Repairing | None = None
    asked: bool = True
    alone: Resolved | None = None

    @property
    def spelled(self) -> str:
        """How the method is written, with ``{}`` in place of what trains: ``refit+{}``, ``{}+distill``."""
        words = self.method.split("+")
        words[self.first is not None] = "{}"
        return "+".join(words)

    @property
    def parts(self) -> tuple[Method | Teaching, ...]:
        """All of it, in the order in which it is done."""
        return tuple(part for part in (self.first, self.way, self.lesson) if part is not None)

    @property
    def blocks(self) -> int:
        """Blocks of text that are wanted, besides the held-out ones."""
        instead = self.alone.blocks if self.alone is not None else 0
        return max(instead, *(part.blocks for part in self.parts if isinstance(part, Method)))

    def to_data(self) -> dict[str, Any]:
        """Plain data for results and `--show-preset`: the choices that the method uses."""
        options = {name: value for part in self.parts for name, value in part.to_data().items()}
        return {"preset": self.preset, "method": self.method, **options, "seed": self.seed}

    def check(self) -> Resolved:
        """Itself, if every value makes sense.

        Raises:
            UsageError: naming the first that does not.
        """
        for part in self.parts:
            part.check(self.method)
        return self
