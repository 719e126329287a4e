"""A profiling run: a live model or a model folder, tokens, and the profile that comes out."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from lmprune.cuts.plan import check_count
from lmprune.errors import DataError, ModelError, UsageError
from lmprune.forward.batches import batches_of, window_of
from lmprune.forward.calls import LiveModel, Rows
from lmprune.forward.journal import Journal
from lmprune.forward.machine import (
    Shape,
    batch_size,
    batches_at_once,
    decoder_fields,
    fits,
    free_memory,
    weights_bytes,
)
from lmprune.forward.processes import Processes
from lmprune.forward.streaming import StreamedModel
from lmprune.models.cut import Cut, open_cut
from lmprune.profiling.distances import Profile, pairs, summarise
from lmprune.profiling.sequential import Rule, looks
from lmprune.profiling.settings import ProfileSettings
from lmprune.profiling.statistics import Values, first_bad, split, width
from lmprune.text.sources import DataSettings
from lmprune.text.tokens import Tokens, tokenize
from lmprune.versions import versions


class Measurer(Protocol):
    """What gives the values of batches of rows: a live model or a streamed one."""

    layers: int
    at_once: int
    """Batches that are best measured in one call."""

    def measure(self, batches: Sequence[Rows]) -> list[Values]:
        """The values of each batch's rows, in order."""


@dataclass(frozen=True)
class Subject:
    """Which weights are measured, for the record."""

    model: str
    revision: str | None
    fingerprint: str | None
    dtype: str


def profile(model: Any, tokens: Any, settings: ProfileSettings | None = None, **changes: Any) -> Profile:
    """Measure a live model as it stands, and leave no hook and no changed state behind, also after an error.

    Args:
        model: a causal language model of transformers, also dropped, quantised, dispatched or wrapped by PEFT.
        tokens: `Tokens`; or sequences of ids; or a tokenizer's padded batch with ``input_ids`` and
            ``attention_mask``, padded left or right.
        settings: the options; those about text and about loading a model have no meaning here.
        changes: single options instead, such as ``token="all"``.

    Raises:
        DataError: there are no tokens, or ids that the model does not know.
        ModelError: the decoder's layers are not found; a state holds NaN or infinity (names layer and sample).
        UsageError: an option is out of range.
    """
    settings = dataclasses.replace(settings or ProfileSettings(), **changes)
    measurer = LiveModel(model, settings.token, _say)
    config = model.config.to_dict()
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    subject = Subject(name, None, None, str(model.dtype).removeprefix("torch."))
    shape = Shape.of(config, model.dtype.itemsize)
    run = _Run(settings, subject, shape, next(model.parameters()).device.type, Processes())
    rows = _known(as_tokens(tokens).take(settings.samples), config)
    return run.profile(measurer, rows, run.batch_size(rows), run.rule(), None, progress=False)


def profile_model(
    model: str | Path | Cut,
    output: Path | None,
    settings: ProfileSettings,
    data: DataSettings,
    *,
    revision: str | None = None,
    reuse: bool = False,
    progress: bool = True,
) -> Profile:
    """Find the model, read the text, load the model or stream it, measure, and write ``output`` in the main process.

    With an ``output``, values are kept in ``output.partial`` as they come, from which an interrupted run goes on.

    Args:
        model: whatever `open_cut` opens: a model, or a recipe, whose cut is measured.
        reuse: give back the profile in ``output`` if it is the one that would be made.

    Raises:
        ModelError, DataError, NetworkError: the model or the text cannot be had.
        OutputError: the output cannot be written.
        UsageError: options that do not go together, or a block size that the model does not have.
    """
    processes = Processes.join()
    cut = open_cut(model, revision)
    device = _device(settings.device, processes)
    dtype = getattr(torch, settings.dtype) if settings.dtype != "auto" else cut.whole_config.dtype or torch.float32
    shape = Shape.of(cut.config, dtype.itemsize)
    kind = settings.quantization or str(dtype).removeprefix("torch.")
    subject = Subject(cut.name, cut.base.revision if cut.plan is None else None, cut.fingerprint, kind)
    run = _Run(settings, subject, shape, device.type, processes)
    rule = run.rule()
    tokens = _tokens(cut, settings, data)
    if tokens.samples < settings.samples and processes.main:
        _say(f"{tokens.source} holds {tokens.samples} samples, fewer than the {settings.samples} that were asked for")
    size = run.batch_size(tokens)
    if reuse and output is not None and output.is_file():
        known = Profile.read(output)
        if run.would_make(known, tokens, size, rule):
            return known
    measurer: Measurer
    if _streams(settings, weights_bytes(cut.checkpoint, dtype.itemsize), device, processes):
        longest = max(map(len, tokens.rows))
        at_once = batches_at_once(shape, settings.token, longest, size, device.type)
        measurer = StreamedModel(cut, settings.token, dtype=settings.dtype, device=device, at_once=at_once)
    else:
        live = cut.load(
            dtype=settings.dtype,
            device=None if settings.device_map else str(device),
            device_map=settings.device_map,
            quantization=settings.quantization,
        )
        measurer = LiveModel(live, settings.token, _say)
    return run.profile(measurer, tokens, size, rule, output, progress=progress)


def _tokens(cut: Cut, settings: ProfileSettings, data: DataSettings) -> Tokens:
    tokens = tokenize(
        data,
        cut.tokenizer(),
        samples=settings.samples,
        max_length=min(settings.max_length, cut.window or settings.max_length),
        seed=settings.seed,
        default=cut.default_data,
    )
    return _known(tokens, cut.config)


@dataclass(frozen=True)
class _Run:
    """Everything that is known before the first forward pass."""

    settings: ProfileSettings
    subject: Subject
    shape: Shape
    device: str
    processes: Processes

    def batch_size(self, tokens: Tokens) -> int:
        longest = max(map(len, tokens.rows))
        return self.settings.batch_size or batch_size(self.shape, self.settings.token, longest, self.device)

    def rule(self) -> Rule | None:
        layers = self.shape.layers
        count = self.settings.drop or max(1, round(layers / 4))
        check_count(count, layers)
        if self.settings.until is None:
            return None
        return Rule(layers, count, self.settings.until, self.settings.indifference)

    def would_make(self, known: Profile, tokens: Tokens, size: int, rule: Rule | None) -> bool:
        """Whether ``known`` is the profile that this run would end with."""
        settings = {name: value for name, value in known.settings.items() if name != "certain"}
        return (
            (known.fingerprint, known.dtype, known.token)
            == (self.subject.fingerprint, self.subject.dtype, self.settings.token)
            and settings == self._recorded(tokens, size, rule)
            and (known.samples == tokens.samples or (rule is not None and bool(known.settings["certain"])))
            and known.data_hash == tokens.take(known.samples).hash
        )

    def profile(
        self,
        measurer: Measurer,
        tokens: Tokens,
        size: int,
        rule: Rule | None,
        output: Path | None,
        *,
        progress: bool,
    ) -> Profile:
        """Measure until the rule is content or the samples are used up."""
        batches = batches_of([len(row) for row in tokens.rows], size)
        journal = self._journal(tokens, size, output)
        try:
            finished, certain = self._measure_all(measurer, tokens, batches, size, rule, journal, progress)
        except KeyboardInterrupt:
            if output is not None and self.processes.main:
                _say(
                    f"interrupted after {journal.rows} of {tokens.samples} samples: the same command goes on from there"
                )
            raise
        if rule is not None and not certain and self.processes.main:
            _say(f"not certain after {journal.rows} samples. Give more with --samples")
        result = self._result(journal.values, batches[:finished], tokens.take(journal.rows), size, rule, certain)
        if output is not None and self.processes.main:
            result.write(output)
            journal.remove()
        return result

    def _measure_all(
        self,
        measurer: Measurer,
        tokens: Tokens,
        batches: list[list[int]],
        size: int,
        rule: Rule | None,
        journal: Journal,
        progress: bool,
    ) -> tuple[int, bool]:
        """Measure the batches that ``journal`` lacks; (batches that are measured, whether the rule is content)."""
        ends = np.cumsum([len(batch) for batch in batches])
        stops = looks(tokens.samples, window_of(size)) if rule else []
        finished = int(np.searchsorted(ends, journal.rows, side="right"))
        journal.cut(int(ends[finished - 1]) if finished else 0)
        hidden = None if progress and self.processes.main else True
        with tqdm(total=tokens.samples, initial=journal.rows, unit=" samples", disable=hidden) as bar:
            while True:
                certain = rule is not None and _settled(rule, journal.values, stops)
                if certain or finished == len(batches):
                    return finished, certain
                # Up to the next look at most, so that how much is measured at once does not change where it ends.
                last = min([stop for stop in stops if stop > journal.rows], default=tokens.samples)
                group = batches[finished : finished + measurer.at_once * self.processes.size]
                group = group[: int(np.searchsorted(ends[finished:], last)) + 1]
                for batch, values in zip(group, self._measured(measurer, group, tokens)):
                    self._check(values, batch)
                    journal.append(values)
                    bar.update(len(batch))
                finished += len(group)

    def _journal(self, tokens: Tokens, size: int, output: Path | None) -> Journal:
        identity = {
            **dataclasses.asdict(self.subject),
            "tokens": tokens.hash,
            "token": self.settings.token,
            "batch_size": size,
            "device": self.device,
            "lmprune": versions().get("lmprune"),
        }
        path = output.with_name(output.name + ".partial") if output is not None and self.processes.main else None
        journal = Journal(path, identity, width(self.shape.layers), resume=self.settings.resume)
        if journal.stale:
            _say(f"{path} was left by another command: starting anew")
        elif path is not None and journal.rows:
            _say(f"going on from {path}: {journal.rows} of {tokens.samples} samples are measured")
        done = self.processes.from_main(journal.values)
        if not self.processes.main:
            journal.append(done)
        return journal

    def _measured(self, measurer: Measurer, group: list[list[int]], tokens: Tokens) -> list[Values]:
        """The values of every batch of ``group``, each measured by one of the processes."""
        share = group[self.processes.rank :: self.processes.size]
        mine = measurer.measure([[tokens.rows[sample] for sample in batch] for batch in share])
        every = self.processes.gather(mine)
        return [every[place % self.processes.size][place // self.processes.size] for place in range(len(group))]

    def _check(self, values: Values, batch: list[int]) -> None:
        bad = first_bad(values, self.shape.layers)
        if bad is None:
            return
        row, state, problem = bad
        where = f"the output of layer {state - 1}" if state else "the embedding, the input of layer 0,"
        remedy = "Try --dtype float32 or bfloat16" if self.subject.dtype == "float16" else "Check the weights"
        raise ModelError(f"{where} {problem} for sample {batch[row]}. {remedy}")

    def _result(
        self, values: Values, batches: list[list[int]], tokens: Tokens, size: int, rule: Rule | None, certain: bool
    ) -> Profile:
        in_order = np.empty_like(values)
        in_order[np.concatenate(batches)] = values  # so that sums do not depend on how samples were batched
        settings = self._recorded(tokens, size, rule)
        return summarise(
            *split(in_order, self.shape.layers),
            **dataclasses.asdict(self.subject),
            token=self.settings.token,
            source=tokens.source,
            data_hash=tokens.hash,
            tokens=tokens.count,
            seed=self.settings.seed,
            settings=settings if rule is None else {**settings, "certain": certain},
            versions=versions(),
        )

    def _recorded(self, tokens: Tokens, size: int, rule: Rule | None) -> dict[str, Any]:
        """The options that the result depends on and that have no place of their own in a profile."""
        data = {f.name: getattr(tokens.settings, f.name) for f in dataclasses.fields(tokens.settings)}
        settings = {
            "max_length": self.settings.max_length,
            "batch_size": size,
            **{name: value for name, value in data.items() if value},
        }
        if rule is not None:
            settings |= {"until": rule.level, "drop": rule.n, "indifference": rule.indifference}
        return settings


def _settled(rule: Rule, values: Values, stops: list[int]) -> bool:
    if len(values) not in stops:
        return False
    starts, ends = pairs(rule.layers)
    return rule.settled(values[:, np.flatnonzero(ends - starts == rule.n)], stops.index(len(values)) + 1)


def as_tokens(tokens: Any) -> Tokens:
    """What a caller of `profile` gives, as `Tokens`."""
    if isinstance(tokens, Tokens):
        return tokens
    if isinstance(tokens, Mapping) or hasattr(tokens, "input_ids"):
        return Tokens.from_padded(tokens["input_ids"], tokens.get("attention_mask"))
    return Tokens(tuple(np.asarray(row, dtype=np.int32) for row in tokens))


def _known(tokens: Tokens, config: Mapping[str, Any]) -> Tokens:
    """``tokens``, if the model has an embedding for each."""
    largest, size = max(int(row.max()) for row in tokens.rows), decoder_fields(config).get("vocab_size")
    if size is not None and largest >= size:
        raise DataError(f"{tokens.source}: token {largest}, but the model knows 0 to {size - 1}. Is it its tokenizer?")
    return tokens


def _device(name: str, processes: Processes) -> torch.device:
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", processes.local_rank % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise UsageError(f"--device {name!r} is no device. Give auto, cpu, cuda, cuda:1 or mps") from exc
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch sees no CUDA device here. Use --device cpu")
    return device


def _streams(settings: ProfileSettings, weights: int, device: torch.device, processes: Processes) -> bool:
    """Whether to stream: as asked, or else when the weights do not fit."""
    if settings.stream is not None or settings.quantization or settings.device_map:
        return bool(settings.stream)
    if fits(weights, device):
        return False
    if processes.main:
        free = free_memory(str(device))
        _say(
            f"the weights take {weights / 1e9:.1f} GB and {free / 1e9:.1f} GB are free on {device}: "
            "reading one layer at a time (--stream)"
        )
    return True


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)
