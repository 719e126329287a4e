"""What a profiling run can be told. Pure: the command line reads its options from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lmprune.errors import UsageError
from lmprune.settings import (
    AS_MEASURED,
    FEW_BITS,
    Useless,
    check_shared,
    device_option,
    dtype_option,
    given,
    option,
    seed_option,
)


@dataclass(frozen=True)
class ProfileSettings:
    """How states are measured. Numbers out of range raise a `UsageError`."""

    PANEL: ClassVar[str] = "Measuring"
    USELESS: ClassVar[tuple[Useless, ...]] = (
        Useless(("device", "stream"), given("device_map"), "--device-map says where layers are"),
        Useless(
            ("stream",), lambda values: values["quantization"] and not values["stream"], "few bits are not streamed"
        ),
    )

    samples: int = option(1000, "Samples to measure, at most.", metavar="N")
    max_length: int = option(2048, "Tokens of a sample, at most.", metavar="T")
    token: Literal["last", "all"] = option("last", "Measure the last token of each sample (the paper), or all of them.")
    seed: int = seed_option("Seed of the choice of samples.")
    drop: int | None = option(
        None,
        "Number of layers whose best block --until must be certain of. Default: a quarter of the layers.",
        metavar="N",
        needs="until",
    )
    until: float | None = option(
        None, "Stop as soon as the best block is certain to this level, for example 0.95.", metavar="LEVEL"
    )
    indifference: float = option(
        0.01,
        "Share of the distance within which --until takes two blocks for equally good.",
        metavar="F",
        needs="until",
    )
    batch_size: int | None = option(
        None, "Samples in one forward pass. Default: chosen by device; halved when memory runs out.", metavar="B"
    )
    device: str = device_option()
    device_map: str | None = option(
        None, "Spread the layers over devices: auto, balanced or sequential (accelerate).", metavar="MAP"
    )
    dtype: str = dtype_option(AS_MEASURED)
    quantization: Literal["nf4", "int8"] | None = option(None, FEW_BITS, metavar="Q")
    stream: bool | None = option(
        None,
        "Read one layer at a time, for models larger than memory. Default: when the model does not fit.",
        flag="--stream/--no-stream",
    )
    resume: bool = option(True, "Go on from an interrupted run of the same command.", flag="--resume/--no-resume")

    def __post_init__(self) -> None:
        for name in ("samples", "max_length", "batch_size", "drop"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: give a number from 1")
        if self.token not in ("last", "all"):
            raise UsageError(f"--token {self.token!r}: give last or all")
        if self.until is not None and not 0.5 <= self.until < 1:
            raise UsageError(f"--until {self.until}: give a level from 0.5 up to, but not, 1, for example 0.95")
        if self.indifference != 0.01 and self.until is None:
            raise UsageError(f"--indifference {self.indifference} has no effect without --until. Leave it out")
        if not 0 <= self.indifference < 1:
            raise UsageError(f"--indifference {self.indifference}: give a share from 0 up to, but not, 1")
        check_shared(self)
        if self.stream and (self.quantization or self.device_map):
            raise UsageError("--stream reads one layer at a time: it goes with neither --quantization nor --device-map")
