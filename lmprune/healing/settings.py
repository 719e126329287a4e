"""What a user may say about a healing run, and what is settled once a preset has filled the gaps. Pure: no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from lmprune.errors import UsageError, nearest
from lmprune.settings import option

TRAINS = ("lora", "qlora", "last-layers", "full", "junction")
"""What trains. Each may be joined with ``distill``: ``full+distill``; ``distill`` alone means ``lora+distill``."""

SCHEDULES = ("cosine", "linear", "constant_with_warmup")
HEADS = ("auto", "train", "frozen")
_PRESET_SAYS = " Default: the preset's."


@dataclass(frozen=True)
class HealSettings:
    """The options of ``lmprune heal``; None leaves a value to the preset."""

    preset: str = option("quick", "Where defaults come from: quick, gromov, review or reassessing.")
    method: str | None = option(
        None, f"What trains: {', '.join(TRAINS)}; or distill, alone or joined as in full+distill.{_PRESET_SAYS}"
    )
    steps: int | None = option(None, f"Optimizer steps.{_PRESET_SAYS}")
    batch: int | None = option(None, f"Blocks per step, over all devices.{_PRESET_SAYS}")
    micro_batch: int | None = option(None, "Blocks that one device works on at once. Default: 4096 tokens' worth.")
    max_length: int | None = option(None, f"Tokens per block.{_PRESET_SAYS}")
    lr: float | None = option(None, f"Peak learning rate.{_PRESET_SAYS}")
    warmup: int | None = option(None, f"Warm-up steps.{_PRESET_SAYS}")
    schedule: str | None = option(None, f"Learning rate after it: {', '.join(SCHEDULES)}.{_PRESET_SAYS}")
    weight_decay: float | None = option(None, f"AdamW's weight decay.{_PRESET_SAYS}")
    rank: int | None = option(None, f"LoRA rank.{_PRESET_SAYS}")
    alpha: float | None = option(None, "LoRA alpha. Default: the rank, as in the paper.")
    dropout: float | None = option(None, f"LoRA dropout.{_PRESET_SAYS}")
    targets: str | None = option(
        None, f"Where LoRA sits: ffn, attention, all, or names such as q_proj,v_proj.{_PRESET_SAYS}"
    )
    bits: int | None = option(
        None, "Bits of the frozen weights while training: 4, 8 or 16. Default: 4 for qlora, else 16."
    )
    last: int | None = option(None, f"last-layers: how many layers train.{_PRESET_SAYS}")
    head: str | None = option(
        None, "last-layers: auto trains lm_head where it has weights of its own; train unties it; frozen leaves it."
    )
    kl: float | None = option(None, f"distill: weight of the KL divergence to the unpruned model.{_PRESET_SAYS}")
    hard: float | None = option(None, f"distill: weight of the true next token.{_PRESET_SAYS}")
    aux: float | None = option(None, f"distill: weight of the hidden state after the cut (eq. 8).{_PRESET_SAYS}")
    temperature: float | None = option(None, f"distill: softens both distributions.{_PRESET_SAYS}")
    top_k: int | None = option(
        None, f"distill: teacher's likeliest tokens; the rest is one outcome; 0 is all.{_PRESET_SAYS}"
    )
    eval_blocks: int | None = option(None, f"Held-out blocks.{_PRESET_SAYS}")
    eval_every: int | None = option(None, "Steps between evaluations, each with a checkpoint. Default: a tenth of all.")
    eval_data: str | None = option(None, "Held-out text. Default: documents of --data that never train.", metavar="SRC")
    patience: int | None = option(None, "Stop after this many evaluations without a better loss. Default: never.")
    seed: int = option(0, "Seed of data order, adapters and dropout.")
    gradient_checkpointing: bool = option(
        False, "Recompute activations to save memory.", flag="--gradient-checkpointing/--no-gradient-checkpointing"
    )
    dtype: str | None = option(
        None, "Type of computation: bfloat16 or float32. Default: bfloat16 on a GPU, else float32."
    )
    device: str | None = option(None, "cpu or cuda. Default: cuda where there is one.")
    report_to: str = option("none", "Trainer's loggers: none, tensorboard, wandb, trackio.")
    keep_adapter: bool = option(
        False, "Write the LoRA adapter alone instead of a merged checkpoint.", flag="--keep-adapter"
    )
    self_data: bool = option(
        False, "Train on text that the unpruned model writes to prompts from --data; cached.", flag="--self-data"
    )
    restart: bool = option(False, "Throw away an unfinished run for the same OUT.", flag="--restart")


@dataclass(frozen=True)
class Resolved:
    """Every choice of a healing run, settled. Field names are those of `HealSettings`."""

    preset: str
    trains: str
    distill: bool
    steps: int
    batch: int
    max_length: int
    lr: float
    warmup: int
    schedule: str
    weight_decay: float
    rank: int
    alpha: float
    dropout: float
    targets: str
    bits: int
    last: int
    head: str
    kl: float
    hard: float
    aux: float
    temperature: float
    top_k: int
    eval_blocks: int
    eval_every: int
    seed: int

    @property
    def method(self) -> str:
        """As the user writes it: ``full+distill``."""
        return self.trains + ("+distill" if self.distill else "")

    @property
    def adapter(self) -> bool:
        """Whether an adapter trains, and not the weights themselves."""
        return self.trains in ("lora", "qlora")

    @property
    def quantization(self) -> Literal["nf4", "int8"] | None:
        """The spelling of `lmprune.models.loading`."""
        return "nf4" if self.bits == 4 else "int8" if self.bits == 8 else None

    def to_data(self) -> dict[str, Any]:
        """Plain data for results and `--show-preset`; choices that the method does not use are left out."""
        unused: set[str] = {"trains"}
        if not self.adapter:
            unused |= {"rank", "alpha", "dropout", "targets", "bits"}
        if self.trains != "last-layers":
            unused |= {"last", "head"}
        if not self.distill:
            unused |= {"kl", "hard", "aux", "temperature", "top_k"}
        data = {"preset": self.preset, "method": self.method, **asdict(self)}
        return {name: value for name, value in data.items() if name not in unused and name != "distill"}

    def check(self) -> Resolved:
        """Itself, if every value makes sense.

        Raises:
            UsageError: naming the first that does not.
        """
        for name in (
            "steps",
            "batch",
            "max_length",
            "lr",
            "rank",
            "alpha",
            "last",
            "eval_blocks",
            "eval_every",
            "temperature",
        ):
            if not getattr(self, name) > 0:  # nor is nan
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: give a number above 0")
        for name in ("warmup", "weight_decay", "kl", "hard", "aux", "top_k", "dropout"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: give 0 or more")
        if self.max_length < 2:
            raise UsageError(f"--max-length {self.max_length}: predicting a token needs one before it; give 2 or more")
        if not 0 <= self.seed < 1 << 32:
            raise UsageError(f"--seed {self.seed}: give a number from 0 to {(1 << 32) - 1}")
        if self.dropout >= 1:
            raise UsageError(f"--dropout {self.dropout}: give a share below 1")
        if self.distill and not self.kl + self.hard + self.aux:
            raise UsageError("--kl, --hard and --aux are all 0, so there is nothing to learn. Give one a weight")
        choose("--schedule", self.schedule, SCHEDULES)
        choose("--head", self.head, HEADS)
        if self.bits not in (4, 8, 16):
            raise UsageError(f"--bits {self.bits}: choose 4, 8 or 16")
        if self.bits != 16 and not self.adapter:
            raise UsageError(
                f"--bits {self.bits} with --method {self.method}: quantised weights cannot train. Use qlora"
            )
        return self


def choose(option_name: str, value: str, known: tuple[str, ...]) -> str:
    """``value`` if it is one of ``known``.

    Raises:
        UsageError: it is not.
    """
    if value not in known:
        raise UsageError(
            f"{option_name} {value!r} does not exist{nearest(value, known)}. Choose from {', '.join(known)}"
        )
    return value


def parse_method(method: str) -> tuple[str, bool]:
    """What trains, and whether the unpruned model teaches.

    >>> parse_method("distill"), parse_method("full+distill"), parse_method("qlora")
    (('lora', True), ('full', True), ('qlora', False))
    """
    parts = method.split("+")
    trains = [part for part in parts if part != "distill"]
    if len(trains) > 1 or parts.count("distill") > 1:
        raise UsageError(f"--method {method!r}: join one of {', '.join(TRAINS)} with distill, as in full+distill")
    return choose("--method", trains[0], (*TRAINS, "distill")) if trains else "lora", "distill" in parts


def overrides(settings: HealSettings) -> dict[str, Any]:
    """The values that the user gave, of those that a preset may also give."""
    names = {field.name for field in fields(Resolved)}
    return {name: value for name, value in asdict(settings).items() if name in names and value is not None}
