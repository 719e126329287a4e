"""What was measured, as plain data. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from html import escape
from typing import Any, TypeVar

from lmprune.errors import RecipeError, line_of
from lmprune.versions import versions

FORMAT, VERSION = "lmprune-bench", 1
T = TypeVar("T")


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as the first model: the median of the runs, and the middle 80 % of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, mine: Sequence[float], reference: Sequence[float]) -> Ratio:
        """From seconds of the same runs."""
        ratios = [theirs / ours for ours, theirs in zip(mine, reference)]
        return cls(statistics.median(ratios), quantile(ratios, 0.1), quantile(ratios, 0.9))


@dataclass(frozen=True)
class Row:
    """One model at one prompt length and batch size. Seconds are latencies; speeds are medians over the runs.

    Attributes:
        ideal: parameters that a token passes through in the first model over those in this one, head included: the
            limit of what a cut can gain, in whatever type the weights are.
        prefill_p50, prefill_p90: seconds of a whole prefill.
        decode_p50, decode_p90: seconds of one decoded token (of each sequence of the batch).
        peak_bytes: weights and the largest working memory of a run; None where the device does not tell.
        flops_per_token: of the prefill, counted by torch; None where an operation has no count.
        joules_per_token: of decoding, by NVML; None on other devices.
    """

    name: str
    layers: int
    parameters: int
    weight_bytes: int
    quantization: str | None
    prompt: int
    batch_size: int
    prefill_tokens_per_second: float
    prefill_p50: float
    prefill_p90: float
    decode_tokens_per_second: float
    decode_p50: float
    decode_p90: float
    peak_bytes: int | None
    flops_per_token: float | None
    joules_per_token: float | None
    ideal: float
    prefill_ratio: Ratio
    decode_ratio: Ratio


@dataclass(frozen=True, repr=False)
class Bench:
    """All rows, and what they were measured with."""

    rows: tuple[Row, ...]
    settings: Mapping[str, Any]
    device: str
    threads: int
    versions: Mapping[str, str] = field(default_factory=versions)

    def to_data(self) -> dict[str, Any]:
        """Plain data for ``--json`` and files."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def from_data(cls, data: Any, where: str = "bench") -> Bench:
        """Read `to_data`'s form, of which nothing is trusted.

        Raises:
            RecipeError: it is no such thing.
        """
        what = f"{where} was not written by `lmprune bench`. Move it elsewhere"
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
            raise RecipeError(what)
        try:
            rows = tuple(_read(Row, row) for row in data["rows"])
            settings = {name: data["settings"][name] for name in data["settings"]}
            versions = {str(name): str(version) for name, version in data["versions"].items()}
            counts = (data["threads"], settings["runs"], settings["warmup"])
            _require(all(type(count) is int for count in counts) and type(data["device"]) is str, "threads or runs")
            return cls(rows, settings, data["device"], data["threads"], versions)
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise RecipeError(f"{what} ({line_of(exc, 80)})") from exc

    def __repr__(self) -> str:
        said = ", ".join(f"{row.name} {row.decode_ratio.median:.2f}x" for row in self.rows)
        return f"<Bench on {self.device}, decoding: {said}>"

    def _repr_html_(self) -> str:
        """The main columns, for a notebook."""
        head = ("model", "layers", "prompt", "batch", "prefill tokens/s", "decode tokens/s", "times as fast", "ideal")
        lines = [
            (row.name, row.layers, row.prompt, row.batch_size, f"{row.prefill_tokens_per_second:,.0f}",
             f"{row.decode_tokens_per_second:,.1f}", f"{row.decode_ratio.median:.2f}", f"{row.ideal:.2f}")
            for row in self.rows
        ]  # fmt: skip
        cells = ["".join(f"<td>{escape(str(cell))}</td>" for cell in line) for line in lines]
        titles = "".join(f"<th>{title}</th>" for title in head)
        return f"<table><tr>{titles}</tr>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>"


def _read(kind: type[T], data: Mapping[str, Any]) -> T:
    """A `Row` or `Ratio` of plain data whose every value is of its field's type."""
    values: dict[str, Any] = {}
    for field_ in fields(kind):  # type: ignore[arg-type]  # mypy knows no type of dataclasses
        value = data[field_.name]
        if field_.type == "Ratio":
            values[field_.name] = _read(Ratio, value)
            continue
        allowed = _TYPES[str(field_.type)]
        right = type(value) in allowed and (not isinstance(value, float) or math.isfinite(value))
        _require(right and (not isinstance(value, int) or abs(value) < 1 << 63), field_.name)
        values[field_.name] = value
    return kind(**values)


def _require(right: bool, name: str) -> None:
    if not right:
        raise ValueError(f"{name} is of another type")


_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,), "str | None": (str, type(None)), "int": (int,), "int | None": (int, type(None)),
    "float": (float, int), "float | None": (float, int, type(None)),
}  # fmt: skip


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of all lie, between neighbours by a straight line.

    >>> quantile([1.0, 2.0, 3.0], 0.25)
    1.5
    """
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
