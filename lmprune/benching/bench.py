"""Speed and memory of models side by side: measured in turns, so that a busy machine slows all of them alike.

A run is one prefill of a prompt and then the decoding of some tokens with the cache, one by one. Warm-up runs are
discarded; each model has at least `LEAST_RUNS` measured ones (the protocol of the Lobotomy study). Models of the same
weights are loaded once. A model's ratio is taken run by run to the first model's, and its spread is that of the runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from lmprune.cuts.plan import Plan
from lmprune.errors import HostError, UsageError
from lmprune.models.locate import ModelFolder
from lmprune.settings import option
from lmprune.versions import versions

LEAST_RUNS = 10
_SEED = 0


@dataclass(frozen=True)
class BenchSettings:
    """What is measured, and how often."""

    prompts: str = option("128,512", "Prompt lengths, in tokens.", metavar="N,...")
    batches: str = option("1,8", "Batch sizes.", metavar="B,...")
    tokens: int = option(32, "Tokens to decode after each prompt.", metavar="N")
    runs: int = option(LEAST_RUNS, "Measured runs of each model.", metavar="N")
    warmup: int = option(3, "Runs before them that do not count.", metavar="N")
    quant: str | None = option(None, "Also measure each model in these types: nf4, int8 or both.", metavar="Q,...")
    device: str | None = option(None, "cpu, cuda, cuda:1 or mps. Default: the fastest there is.", metavar="D")
    dtype: str = option("auto", "float32, bfloat16, float16, or auto: that of the checkpoint.", metavar="D")

    def __post_init__(self) -> None:
        if self.runs < LEAST_RUNS:
            raise UsageError(
                f"--runs {self.runs}: fewer than {LEAST_RUNS} runs give no spread. Give at least {LEAST_RUNS}"
            )
        if self.warmup < 1:
            raise UsageError(f"--warmup {self.warmup}: the first run is never typical. Give at least 1")
        if self.tokens < 2:
            raise UsageError(f"--tokens {self.tokens}: give at least 2")
        for name in self.quants:
            if name not in ("nf4", "int8"):
                raise UsageError(f"--quant {name!r}: give nf4, int8 or nf4,int8")
        self.sizes("prompts"), self.sizes("batches")

    def sizes(self, field: Literal["prompts", "batches"]) -> list[int]:
        """The numbers of a comma-separated field."""
        words = getattr(self, field).split(",")
        if not all(word.strip().isdecimal() and int(word) for word in words):
            raise UsageError(f"--{field} {getattr(self, field)!r}: give numbers from 1 with commas, as in 1,8")
        return [int(word) for word in words]

    @property
    def quants(self) -> list[Any]:
        """The quantised types."""
        return [word.strip() for word in self.quant.split(",")] if self.quant else []


@dataclass(frozen=True)
class Subject:
    """A model to measure: ``plan`` cuts it in memory."""

    name: str
    folder: ModelFolder
    plan: Plan | None = None
    quantization: Literal["nf4", "int8"] | None = None

    @property
    def what(self) -> tuple[Path, Plan | None]:
        """The model apart from its name and from how its weights are held."""
        return self.folder.path, self.plan

    @classmethod
    def whole(cls, folder: ModelFolder, name: str | None = None) -> Subject:
        """A model as it stands on disk."""
        return cls(name or _short(folder.name), folder)

    @classmethod
    def cut(cls, folder: ModelFolder, plan: Plan, name: str) -> Subject:
        """A model without some of its layers."""
        return cls(name, folder, plan)

    @classmethod
    def named(cls, word: str) -> Subject:
        """What a user writes: ``demo``, a folder, a Hub id, or a recipe's file.

        Raises:
            ModelError, RecipeError, NetworkError: there is no such thing.
        """
        from lmprune.models.cut import open_cut

        cut = open_cut(word)
        return cls.whole(cut.base) if cut.plan is None else cls.cut(cut.base, cut.plan, Path(word).stem)


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
        ideal: layers of the first model over layers of this one, L/(L-n).
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
    batch: int
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


@dataclass(frozen=True)
class Bench:
    """All rows, and what they were measured with."""

    rows: tuple[Row, ...]
    settings: Mapping[str, Any]
    device: str
    threads: int
    versions: Mapping[str, str] = field(default_factory=versions)

    def to_data(self) -> dict[str, Any]:
        """Plain data for ``--json`` and files."""
        return {"format": "lmprune-bench", "version": 1, **asdict(self)}


@dataclass
class _Runs:
    """What the runs of one model gave."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)
    peak: int | None = None


def measure(subjects: Sequence[Subject], settings: BenchSettings) -> Bench:
    """Load all subjects and measure them in turns; the first is the one that the others are compared with.

    Raises:
        UsageError: a prompt is longer than a model's window.
        HostError: memory is short.
    """
    import torch

    from lmprune.forward.machine import pick_device

    device = settings.device or pick_device().type
    every = [*subjects, *(replace(s, name=f"{s.name} {q}", quantization=q) for s in subjects for q in settings.quants)]
    names = [subject.name for subject in every]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two models are called {repeated!r}. Give each once, or rename a recipe's file")
    try:
        models = _load(every, settings.dtype, device)
        rows = [
            row
            for prompt in settings.sizes("prompts")
            for batch in settings.sizes("batches")
            for row in _compare(every, models, prompt, batch, settings, device)
        ]
    except torch.OutOfMemoryError as exc:
        raise HostError(
            f"out of memory on {device} with {len(every)} models. Give fewer models, or smaller --batches"
        ) from exc
    return Bench(tuple(rows), asdict(settings), _describe(device), torch.get_num_threads())


def _load(subjects: Sequence[Subject], dtype: str, device: str) -> list[Any]:
    """The models; those of the same weights share them."""
    from lmprune.forward.views import pruned_view
    from lmprune.models.loading import load_model

    loaded: dict[tuple[Path, str | None], Any] = {}
    models = []
    for subject in subjects:
        key = (subject.folder.path, subject.quantization)
        if key not in loaded:
            loaded[key] = load_model(*key[:1], quantization=subject.quantization, dtype=dtype, device=device)
        models.append(pruned_view(loaded[key], subject.plan))
    return models


def _compare(
    subjects: Sequence[Subject], models: Sequence[Any], prompt: int, batch: int, settings: BenchSettings, device: str
) -> Iterator[Row]:
    import torch

    from lmprune.models.loading import context_window

    for subject, model in zip(subjects, models):
        window = context_window(model.config)
        if window is not None and prompt + settings.tokens > window:
            raise UsageError(
                f"--prompts {prompt} and {settings.tokens} decoded tokens pass the window of {subject.name}, {window}"
            )
    words = min(model.config.get_text_config().vocab_size for model in models)
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(words, (batch, prompt), generator=generator).to(device)
    runs = [_Runs() for _ in models]
    rounds = settings.warmup + settings.runs
    for number in tqdm(range(rounds), f"{prompt} tokens x {batch}", leave=False, disable=None):  # None: on terminals
        # Each round begins with another model, so that none always follows the same one.
        for turn in range(len(models)):
            which = (turn + number) % len(models)
            _one_run(models[which], ids, settings.tokens, runs[which] if number >= settings.warmup else _Runs())
    # Of packed weights neither can be counted: they are those of the same model as it is, where that is measured too.
    flops = {s.what: _flops(model, ids[:1]) for s, model in zip(subjects, models) if not s.quantization}
    counts = {s.what: _parameters(model) for s, model in zip(subjects, models) if not s.quantization}
    layers = [_layers(model) for model in models]
    for subject, model, mine, count in zip(subjects, models, runs, layers):
        weights = _weight_bytes(model)
        yield Row(
            name=subject.name,
            layers=count,
            parameters=counts[subject.what] if subject.what in counts else _parameters_of(subject),
            weight_bytes=weights,
            quantization=subject.quantization,
            prompt=prompt,
            batch=batch,
            prefill_tokens_per_second=batch * prompt / statistics.median(mine.prefill),
            prefill_p50=statistics.median(mine.prefill),
            prefill_p90=quantile(mine.prefill, 0.9),
            decode_tokens_per_second=batch * settings.tokens / statistics.median(mine.decode),
            decode_p50=statistics.median(mine.steps),
            decode_p90=quantile(mine.steps, 0.9),
            peak_bytes=None if mine.peak is None else weights + mine.peak,
            flops_per_token=flops.get(subject.what),
            joules_per_token=statistics.median(mine.joules) / (batch * settings.tokens) if mine.joules else None,
            ideal=layers[0] / count,
            prefill_ratio=Ratio.of(mine.prefill, runs[0].prefill),
            decode_ratio=Ratio.of(mine.decode, runs[0].decode),
        )


def _one_run(model: Any, ids: Any, tokens: int, into: _Runs) -> None:
    """Prefill ``ids`` of shape (batch, prompt), then decode greedily, and note the times."""
    import torch

    wait = partial(_wait, ids.device)
    with torch.inference_mode(), _working_memory(ids.device) as working:
        wait()
        began = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, **_last_logits(model))
        step = out.logits[:, -1:].argmax(-1)
        wait()
        into.prefill.append(time.perf_counter() - began)
        joules = _joules(ids.device)
        first = last = time.perf_counter()
        for _ in range(tokens):
            out = model(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
            step = out.logits[:, -1:].argmax(-1)
            wait()
            now = time.perf_counter()
            into.steps.append(now - last)
            last = now
        into.decode.append(last - first)
        if joules is not None and (after := _joules(ids.device)) is not None:
            into.joules.append(after - joules)
    if (used := working()) is not None:
        into.peak = max(into.peak or 0, used)


def _last_logits(model: Any) -> dict[str, int]:
    """The argument that asks for the last position's logits alone, where the model has it, as `generate` does."""
    import inspect

    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}


# --- counting -----------------------------------------------------------------------------------------------------


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


def _tensors(model: Any) -> list[Any]:
    return list({id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values())


def _parameters(model: Any) -> int:
    return sum(tensor.numel() for tensor in {id(p): p for p in model.parameters()}.values())


def _parameters_of(subject: Subject) -> int:
    """`_parameters` of the model as it is, which is not loaded for that."""
    from lmprune.models.cut import Cut

    return _parameters(Cut(subject.folder, subject.plan).empty())


def _weight_bytes(model: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(model))


def _layers(model: Any) -> int:
    from lmprune.models.fields import layer_count

    return layer_count(model.config.to_dict())


def _flops(model: Any, ids: Any) -> float | None:
    """Floating-point operations of a prefill for each of its tokens."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    total = counter.get_total_flops()
    return total / ids.numel() if total else None


# --- devices ------------------------------------------------------------------------------------------------------


def _describe(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(torch.device(device)) if device.startswith("cuda") else device


def _wait(device: Any) -> None:
    """Until the device has done what it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def _working_memory(device: Any) -> Iterator[Callable[[], int | None]]:
    """Gives a function that, after the block, tells by how many bytes memory rose within it at most."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
    elif device.type == "cpu" and _reset_high_water():
        resident = _status("VmRSS")
        yield lambda: max(0, _status("VmHWM") - resident)
    else:
        yield lambda: None


def _reset_high_water() -> bool:
    """Have Linux forget the process's highest memory; False where it cannot."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def _status(name: str) -> int:
    """A size of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def _joules(device: Any) -> float | None:
    """Energy that the GPU has used since its driver started; None where nothing reports it."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
    return None


def _short(name: str) -> str:
    return Path(name).name if Path(name).is_absolute() else name


def prefill_speed(
    models: Sequence[Any], *, batch: int = 8, length: int = 256, runs: int = 10, warm: int = 2
) -> list[float]:
    """Median tokens per second of a forward pass over (batch, length) tokens, for each live model, in turns."""
    import torch

    times: list[list[float]] = [[] for _ in models]
    for number in range(warm + runs):
        for model, seconds in zip(models, times):
            ids = (
                torch.arange(batch * length, device=model.device).view(batch, length)
                % model.config.get_text_config().vocab_size
            )
            _wait(model.device)
            began = time.perf_counter()
            with torch.inference_mode():
                model(input_ids=ids)
            _wait(model.device)
            if number >= warm:
                seconds.append(time.perf_counter() - began)
    return [batch * length / statistics.median(seconds) for seconds in times]
