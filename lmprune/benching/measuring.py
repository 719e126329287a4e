"""Speed and memory of models side by side: measured in turns, so that a busy machine slows all of them alike.

A run is one prefill of a prompt and then the decoding of some tokens with the cache, one by one. Warm-up runs are
discarded; each model has at least `LEAST_RUNS` measured ones (the protocol of the Lobotomy study). Models of the same
weights are loaded once. A model's ratio is taken run by run to the first model's, and its spread is that of the runs.
"""

from __future__ import annotations

import logging
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lmprune.benching import counting, devices
from lmprune.benching.rows import Bench, Ratio, Row, quantile
from lmprune.benching.settings import LEAST_RUNS, BenchSettings
from lmprune.cuts.recipe import Recipe
from lmprune.errors import HostError, UsageError
from lmprune.models.cut import Cut, open_cut
from lmprune.settings import Quantization, several_quantizations

_SEED = 0


@dataclass(frozen=True)
class Subject:
    """A model to measure, and in how few bits its weights are held."""

    name: str
    model: Cut
    quantization: Quantization | None = None

    @property
    def what(self) -> str:
        """The model apart from its name and from how its weights are held."""
        return self.model.fingerprint

    @classmethod
    def of(cls, model: str | Path | Recipe | Cut) -> Subject:
        """Whatever `open_cut` opens, under a short name.

        Raises:
            ModelError, RecipeError, NetworkError: there is no such thing.
        """
        cut = open_cut(model)
        return cls(cut.base.short if cut.plan is None else _short(cut.name), cut)


def _short(name: str) -> str:
    """A cut's name without the folders above it and a recipe's ending; no other, for ``0.6B`` has a dot.

    >>> _short("/runs/cut.yml"), _short("org/Qwen3-0.6B-cut"), _short("/runs/cut.yml+/runs/adapter")
    ('cut', 'org/Qwen3-0.6B-cut', 'cut+adapter')
    """
    parts = [Path(part).name if Path(part).is_absolute() else part for part in name.split("+")]
    return "+".join(re.sub(r"\.ya?ml$", "", part) for part in parts)


def bench(
    models: str | Path | Recipe | Cut | Sequence[str | Path | Recipe | Cut],
    settings: BenchSettings | None = None,
) -> Bench:
    """Measure models side by side; the first is the one that the others are compared with.

    Args:
        models: one or several of whatever `open_cut` opens; a single cut is compared with its own base.

    Raises:
        UsageError: a prompt is longer than a model's window, or two models have one name.
        HostError: memory is short.
    """
    several = [models] if isinstance(models, (str, Path, Recipe, Cut)) else list(models)
    subjects = [Subject.of(model) for model in several]
    if len(subjects) == 1 and subjects[0].model.plan is not None:
        subjects.insert(0, Subject.of(Cut(subjects[0].model.base, name=subjects[0].model.base.name)))
    return measure(subjects, settings or BenchSettings())


@dataclass
class Runs:
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

    from lmprune.forward.machine import out_of_memory, pick_device
    from lmprune.models.loading import context_window

    if settings.runs < LEAST_RUNS:
        logging.getLogger("lmprune").info(
            "--runs %d: fewer than %d give no spread, so take these numbers for a trial", settings.runs, LEAST_RUNS
        )
    device = str(pick_device(settings.device))
    few = several_quantizations(settings.quantizations)
    every = [
        *subjects,
        *(replace(s, name=f"{s.name} {q}", quantization=q) for s in subjects for q in few),
    ]
    names = [subject.name for subject in every]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two models are called {repeated!r}. Give each once, or rename a recipe's file")
    try:
        models = _load(every, settings.dtype, device)
        windows = [found for model in models if (found := context_window(model.config)) is not None]
        rows = [
            row
            for prompt in settings.lengths(min(windows, default=None))
            for batch in settings.sizes("batch_sizes")
            for row in _compare(every, models, prompt, batch, settings, device)
        ]
    except (RuntimeError, MemoryError) as exc:
        if not out_of_memory(exc):
            raise
        raise HostError(
            f"out of memory on {device} with {len(every)} models. Give fewer models, or smaller --batch-sizes"
        ) from exc
    return Bench(tuple(rows), asdict(settings), devices.describe(device), torch.get_num_threads())


def _load(subjects: Sequence[Subject], dtype: str, device: str) -> list[Any]:
    """The models; those of the same weights share them."""
    from lmprune.forward.views import pruned_view
    from lmprune.models.loading import load_model

    loaded: dict[tuple[Path, str | None], Any] = {}
    models = []
    for subject in subjects:
        how: dict[str, Any] = {"quantization": subject.quantization, "dtype": dtype, "device": device}
        narrow = subject.quantization is not None and subject.model.plan is not None and subject.model.plan.parts
        if subject.model.adapter is not None or narrow:  # it changes its own model and no other
            models.append(subject.model.load(**how))
            continue
        key = (subject.model.base.path, subject.quantization)
        if key not in loaded:
            loaded[key] = load_model(key[0], **how)
        models.append(pruned_view(loaded[key], subject.model.plan))
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
    runs = [Runs() for _ in models]
    rounds = settings.warmup + settings.runs
    for number in tqdm(range(rounds), f"{prompt} tokens x {batch}", leave=False, disable=None):  # None: on terminals
        # Each round begins with another model, so that none always follows the same one.
        for turn in range(len(models)):
            which = (turn + number) % len(models)
            _one_run(models[which], ids, settings.tokens, runs[which] if number >= settings.warmup else Runs())
    # Of packed weights neither can be counted: they are those of the same model as it is, where that is measured too.
    flops = {s.what: counting.flops(model, ids[:1]) for s, model in zip(subjects, models) if not s.quantization}
    plain = {s.what: model for s, model in zip(subjects, models) if not s.quantization}
    counted = [plain[s.what] if s.what in plain else s.model.empty() for s in subjects]
    limits = [counting.passed(counted[0]) / counting.passed(one) for one in counted]
    layers = [counting.layers(model) for model in models]
    for subject, model, mine, count, whole, ideal in zip(subjects, models, runs, layers, counted, limits):
        weights = counting.weight_bytes(model)
        yield Row(
            name=subject.name,
            layers=count,
            parameters=counting.parameters(whole),
            weight_bytes=weights,
            quantization=subject.quantization,
            prompt=prompt,
            batch_size=batch,
            prefill_tokens_per_second=batch * prompt / statistics.median(mine.prefill),
            prefill_p50=statistics.median(mine.prefill),
            prefill_p90=quantile(mine.prefill, 0.9),
            decode_tokens_per_second=batch * settings.tokens / statistics.median(mine.decode),
            decode_p50=statistics.median(mine.steps),
            decode_p90=quantile(mine.steps, 0.9),
            peak_bytes=None if mine.peak is None else weights + mine.peak,
            flops_per_token=flops.get(subject.what),
            joules_per_token=statistics.median(mine.joules) / (batch * settings.tokens) if mine.joules else None,
            ideal=ideal,
            prefill_ratio=Ratio.of(mine.prefill, runs[0].prefill),
            decode_ratio=Ratio.of(mine.decode, runs[0].decode),
        )


def _one_run(model: Any, ids: Any, tokens: int, into: Runs) -> None:
    """Prefill ``ids`` of shape (batch, prompt), then decode greedily, and note the times."""
    import torch

    wait = partial(devices.wait, ids.device)
    with torch.inference_mode(), devices.working_memory(ids.device) as working:
        wait()
        began = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, **_last_logits(model))
        step = out.logits[:, -1:].argmax(-1)
        wait()
        into.prefill.append(time.perf_counter() - began)
        joules = devices.joules(ids.device)
        first = last = time.perf_counter()
        for _ in range(tokens):
            out = model(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
            step = out.logits[:, -1:].argmax(-1)
            wait()
            now = time.perf_counter()
            into.steps.append(now - last)
            last = now
        into.decode.append(last - first)
        if joules is not None and (after := devices.joules(ids.device)) is not None:
            into.joules.append(after - joules)
    if (used := working()) is not None:
        into.peak = max(into.peak or 0, used)


def _last_logits(model: Any) -> dict[str, int]:
    """The argument that asks for the last position's logits alone, where the model has it, as `generate` does."""
    import inspect

    inner = (
        model.get_base_model() if hasattr(model, "get_base_model") else model
    )  # PEFT's own forward names no argument
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(inner).forward).parameters else {}


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
            devices.wait(model.device)
            began = time.perf_counter()
            with torch.inference_mode():
                model(input_ids=ids)
            devices.wait(model.device)
            if number >= warm:
                seconds.append(time.perf_counter() - began)
    return [batch * length / statistics.median(seconds) for seconds in times]


def times_as_fast(
    model: Any, whole: Any, *, prompt: int = 64, tokens: int = 16, runs: int = LEAST_RUNS, warm: int = 2
) -> float:
    """How many times as fast as ``whole`` a live model is: prefill and decoding together, batch 1, in turns."""
    import torch

    words = min(each.config.get_text_config().vocab_size for each in (model, whole))
    ids = torch.randint(words, (1, prompt), generator=torch.Generator().manual_seed(_SEED)).to(whole.device)
    ratios = []
    for number in range(warm + runs):
        times = []
        for each in (model, whole) if number % 2 else (whole, model):
            found = Runs()
            _one_run(each, ids, tokens, found)
            times.append(found.prefill[0] + found.decode[0])
        ours, theirs = times if number % 2 else reversed(times)
        if number >= warm:
            ratios.append(theirs / ours)
    return statistics.median(ratios)
