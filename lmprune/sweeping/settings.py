"""What a sweep can be told. Pure: the command line reads its options from here."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from lmprune.criteria import CRITERIA
from lmprune.errors import UsageError
from lmprune.healing.methods import Repairing, find_method
from lmprune.healing.presets import PRESETS
from lmprune.settings import (
    ALSO_FEW_BITS,
    AS_MEASURED,
    FEW_BITS,
    check_choice,
    check_shared,
    device_option,
    dtype_option,
    option,
    seconds_of,
    seed_option,
    words_of,
)

_FREE = ("budget", "launcher", "processes", "points", "share", "bench", "agree", "include_path", "recipes", "params")
"""Settings that change no number, and so may differ when a run goes on."""


@dataclass(frozen=True)
class SweepSettings:
    """Which cuts are measured on what."""

    PANEL: ClassVar[str] = "Sweep"

    fractions: str = option("0.1,0.2,0.3,0.4,0.5", "Shares of the layers to drop.", metavar="F,...")
    criteria: str = option("angular,deepest", "How layers are chosen; each gives a curve.", metavar="C,...")
    params: str | None = option(
        None,
        "Also the best cut of any kind that leaves such a share of the parameters, each searched for.",
        metavar="F,...",
    )
    recipes: str | None = option(
        None, "Also measure cuts made elsewhere, of any kind, by their recipes.", metavar="RECIPE.yml,..."
    )
    tasks: str | None = option(
        None,
        "Tasks or groups of the harness. Default: lmprune_quick, and lmprune_demo for the demo model.",
        metavar="T,...",
    )
    include_path: str | None = option(None, "A folder with tasks of your own.", metavar="FOLDER", flag="--include_path")
    quantizations: str | None = option(None, ALSO_FEW_BITS, metavar="Q,...")
    repair: str | None = option(
        None, "Also repair every point, by this method of `lmprune heal` that trains nothing.", metavar="METHOD"
    )
    heal: str | None = option(None, "Also heal every point, by this preset of `lmprune heal`.", metavar="PRESET")
    heal_steps: int | None = option(None, "Steps of each healing. Default: the preset's.", metavar="N")
    profile: str | None = option(None, "A profile of the model, instead of making one.", metavar="PROFILE.json")
    samples: int = option(256, "Samples of the profile that is made.", metavar="N")
    limit: int | None = option(None, "Documents of each task, at most; for trials.", metavar="N")
    batch_size: str | None = option(
        None, "Batch size of the harness, or auto. Default: auto on a GPU, else 32.", metavar="B"
    )
    device: str = device_option()
    dtype: str = dtype_option(AS_MEASURED)
    quantization: Literal["nf4", "int8"] | None = option(None, FEW_BITS, metavar="Q")
    seed: int = seed_option("Seed of everything that is drawn.", 1234)
    share: bool = option(True, "Compute layers that points have in common once.", flag="--share/--no-share")
    bench: bool = option(True, "Also measure speed and memory, in short.", flag="--bench/--no-bench")
    agree: int = option(
        64,
        "Samples of text for the loss, and for how often a cut says the same as the model; 0 measures neither.",
        metavar="N",
    )
    budget: str | None = option(None, "Stop before a point that would end later, such as 2h or 90m.", metavar="TIME")
    launcher: Literal["accelerate", "print"] | None = option(
        None, "Hand points to separate GPUs by Accelerate, or print the commands for a cluster."
    )
    processes: int | None = option(None, "Processes of the launcher. Default: one for each GPU.", metavar="N")
    points: str | None = option(None, "Only these points, as sweep.json names them.", metavar="P,...")

    def __post_init__(self) -> None:
        for name in ("samples", "limit", "heal_steps", "processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: give a number from 1")
        if self.batch_size not in (None, "auto") and not re.fullmatch(r"[1-9]\d{0,5}", str(self.batch_size)):
            raise UsageError(f"--batch-size {self.batch_size!r}: give a number from 1, or auto")
        if self.heal_steps is not None and self.heal is None:
            raise UsageError("--heal-steps needs --heal PRESET, for example --heal quick")
        if self.processes is not None and self.launcher is None:
            raise UsageError("--processes needs --launcher accelerate or --launcher print")
        check_shared(self)
        if self.device == "mps" and (self.heal or self.repair):
            raise UsageError("--device mps: healing works on a GPU of CUDA or on the CPU. Give cuda or cpu")
        if self.agree < 0:
            raise UsageError(f"--agree {self.agree}: give 0 to measure no agreement, or more")
        if self.quantizations and self.quantization:
            raise UsageError(
                f"--quantizations {self.quantizations} beside --quantization, which holds all points in few bits. Give "
                "one"
            )
        self.shares(), self.budgets(), self.seconds()
        for name in self.names("criteria"):
            if getattr(CRITERIA.find(name), "SUBLAYERS", False):
                raise UsageError(
                    f"--criteria {name}: it drops sublayers, and the points of a sweep are whole layers. Make its "
                    "recipe with `lmprune recipe` and give it with --recipes"
                )
        if self.heal is not None:
            check_choice("--heal", self.heal, tuple(PRESETS))
        if self.repair is not None and not issubclass(find_method(self.repair).way, Repairing):
            raise UsageError(f"--repair {self.repair}: it trains. Give --heal PRESET, or a method that trains nothing")

    def check(self) -> None:
        """Make sure that the files that are named are there.

        Raises:
            UsageError: one is not.
        """
        for name in ("include_path", "profile"):
            value = getattr(self, name)
            if value is not None and not Path(value).expanduser().exists():
                raise UsageError(f"no file or folder {str(value)!r}")

    def shares(self) -> tuple[float, ...]:
        """The fractions, ascending."""
        return _shares("fractions", self.fractions, "layers", "0.1,0.25")

    def budgets(self) -> tuple[float, ...]:
        """The shares of ``--params``, ascending."""
        return _shares("params", self.params, "parameters", "0.9,0.75") if self.params else ()

    def names(self, field: Literal["criteria", "tasks", "points", "recipes"]) -> tuple[str, ...]:
        """The words of a comma-separated field, each once."""
        return words_of(f"--{field}", getattr(self, field))

    def seconds(self) -> float | None:
        """The budget."""
        return None if self.budget is None else seconds_of(self.budget)

    def identity(self) -> dict[str, Any]:
        """All that numbers depend on: a run folder goes on only with the same."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}


def _shares(option: str, text: str, of: str, example: str) -> tuple[float, ...]:
    """Shares with commas, ascending.

    Raises:
        UsageError: one is no share.
    """
    try:
        found = sorted(float(word) for word in text.split(","))
    except ValueError as exc:
        raise UsageError(f"--{option} {text!r}: give numbers with commas, as in {example}") from exc
    for share in found:
        if not 0 < share < 1:
            last = example.rpartition(",")[2]
            raise UsageError(f"--{option} {share}: give shares of the {of} between 0 and 1, for example {last}")
    return tuple(found)
