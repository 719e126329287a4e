"""A profiling run: a live model or a model folder, tokens, and the profile that comes out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from lmprune.errors import UsageError, sized
from lmprune.forward.journal import Journal
from lmprune.forward.machine import fits, free_memory, pick_device, type_to_run, weights_bytes
from lmprune.forward.processes import Processes
from lmprune.models.cut import Cut, open_cut
from lmprune.profiling.distances import Profile
from lmprune.profiling.measuring import LiveModel, Measurer, StreamedModel
from lmprune.profiling.settings import ProfileSettings
from lmprune.profiling.sizes import Shape, batch_size, batches_at_once, decoder_fields
from lmprune.profiling.statistics import Values
from lmprune.profiling.task import Subject, Task, rule_of
from lmprune.text.sources import DataSettings
from lmprune.text.tokens import Tokens, check_known, tokenize

_say = logging.getLogger("lmprune").info


def profile(
    model: Any,
    tokens: Any = None,
    settings: ProfileSettings | None = None,
    data: DataSettings | None = None,
    *,
    out: str | Path | None = None,
    **changes: Any,
) -> Profile:
    """Measure the angular distance of every block of layers, of a live model or of one that is opened for it.

    A live model is measured as it stands, and no hook and no changed state is left behind, also after an error.

    Args:
        model: whatever `open_cut` opens; or a live causal language model of transformers, also dropped, quantised,
            dispatched or wrapped by PEFT.
        tokens: for a live model: `Tokens`; or sequences of ids; or a tokenizer's padded batch with ``input_ids`` and
            ``attention_mask``, padded left or right.
        settings: the options; those about text and about loading a model have no meaning for a live one.
        data: the text for a model that is opened.
        out: where that one's profile is written, and found again if it is the one that would be made.
        changes: single options instead, such as ``token="all"``.

    Raises:
        DataError: there are no tokens, or ids that the model does not know.
        ModelError: the decoder's layers are not found; a state holds NaN or infinity (names layer and sample).
        UsageError: an option is out of range.
    """
    settings = dataclasses.replace(settings or ProfileSettings(), **changes)
    if isinstance(model, (str, Path, Cut)):
        if tokens is not None:
            raise UsageError("tokens go with a live model; one that is opened reads text, which data names")
        path = Path(out) if out is not None else None
        return profile_model(model, path, settings, data or DataSettings(), reuse=path is not None, progress=False)
    measurer = LiveModel(model, settings.token, _say)
    config = model.config.to_dict()
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    subject = Subject(name, None, None, str(model.dtype).removeprefix("torch."))
    rows = _known(as_tokens(tokens).take(settings.samples), config)
    device = next(model.parameters()).device.type
    task = _task(settings, subject, Shape.of(config, model.dtype.itemsize), rows, device)
    return _Run(task, measurer, Processes()).to_profile(None, progress=False)


def profile_model(
    model: str | Path | Cut,
    output: Path | None,
    settings: ProfileSettings,
    data: DataSettings,
    *,
    revision: str | None = None,
    reuse: bool = False,
    live: nn.Module | None = None,
    progress: bool = True,
) -> Profile:
    """Find the model, read the text, load the model or stream it, measure, and write ``output`` in the main process.

    With an ``output``, values are kept in ``output.partial`` as they come, from which an interrupted run goes on.

    Args:
        model: whatever `open_cut` opens: a model, or a recipe, whose cut is measured.
        reuse: give back the profile in ``output`` if it is the one that would be made.
        live: the same model, where it is loaded already, as ``settings`` say.

    Raises:
        ModelError, DataError, NetworkError: the model or the text cannot be had.
        OutputError: the output cannot be written, or another run is writing it.
        UsageError: options that do not go together, or a block size that the model does not have.
    """
    processes = Processes.join(cpu=settings.device == "cpu")
    cut = open_cut(model, revision)
    device = pick_device(settings.device, processes.local_rank)
    settings = processes.from_main(in_type_to_run(settings, cut, device))
    dtype = cut.dtype(settings.dtype)
    shape = Shape.of(cut.config, dtype.itemsize)
    kind = settings.quantization or str(dtype).removeprefix("torch.")
    subject = Subject(cut.name, cut.base.revision if cut.plan is None else None, cut.fingerprint, kind)
    rule_of(settings, shape.layers)  # refused before any text is read
    task = _task(settings, subject, shape, calibration_tokens(cut, settings, data), device.type)
    if task.tokens.samples < settings.samples and processes.main:
        found, asked = task.tokens.samples, settings.samples
        _say(f"{task.tokens.source} holds {found} samples, fewer than the {asked} that were asked for")
    if reuse and output is not None and output.is_file():
        known = Profile.read(output)
        if task.is_done_by(known):
            return known
    measurer = LiveModel(live, settings.token, _say) if live else _measurer(cut, task, shape, device, processes)
    return _Run(task, measurer, processes).to_profile(output, progress=progress)


def in_type_to_run(settings: ProfileSettings, cut: Cut, device: torch.device) -> ProfileSettings:
    """``settings`` with the type that ``cut`` is measured in, where they leave it open."""
    if settings.quantization or settings.device_map:
        return settings
    return dataclasses.replace(settings, dtype=type_to_run(cut, settings.dtype, device, stream=settings.stream))


def _task(settings: ProfileSettings, subject: Subject, shape: Shape, tokens: Tokens, device: str) -> Task:
    longest = max(map(len, tokens.rows))
    size = settings.batch_size or batch_size(shape, settings.token, longest, device)
    return Task(settings, subject, shape.layers, tokens, size, rule_of(settings, shape.layers), device)


def calibration_tokens(cut: Cut, settings: ProfileSettings, data: DataSettings) -> Tokens:
    """The samples that a run with these settings measures.

    Raises:
        DataError, NetworkError: the text cannot be had, or its tokens are not the model's.
    """
    tokens = tokenize(
        data,
        cut.tokenizer(),
        samples=settings.samples,
        max_length=min(settings.max_length, cut.window or settings.max_length),
        seed=settings.seed,
        default=cut.default_data,
    )
    return _known(tokens, cut.config)


def _measurer(cut: Cut, task: Task, shape: Shape, device: torch.device, processes: Processes) -> Measurer:
    """The model in memory; or read layer by layer, as asked, or where its weights do not fit."""
    settings = task.settings
    if _streams(settings, weights_bytes(cut, shape.itemsize), device, processes):
        longest = max(map(len, task.tokens.rows))
        at_once = batches_at_once(shape, settings.token, longest, task.size, device.type)
        return StreamedModel(cut, settings.token, dtype=settings.dtype, device=device, at_once=at_once)
    live = cut.load(
        dtype=settings.dtype,
        device=None if settings.device_map else str(device),
        device_map=settings.device_map,
        quantization=settings.quantization,
    )
    return LiveModel(live, settings.token, _say)


def _streams(settings: ProfileSettings, weights: int, device: torch.device, processes: Processes) -> bool:
    if settings.stream is not None or settings.quantization or settings.device_map:
        return bool(settings.stream)
    if fits(weights, device):
        return False
    if processes.main:
        free = free_memory(device)
        _say(
            f"the weights take {sized(weights)} and {sized(free)} are free on {device}: "
            "reading one layer at a time (--stream)"
        )
    return True


class _Run:
    """A task that is being measured by one process or several."""

    def __init__(self, task: Task, measurer: Measurer, processes: Processes) -> None:
        self.task, self.measurer, self.processes = task, measurer, processes
        self.values: list[Values] = []
        """Of the first batches."""

    @property
    def samples(self) -> int:
        """How many are measured."""
        return sum(map(len, self.values))

    def to_profile(self, output: Path | None, *, progress: bool) -> Profile:
        """Measure until the rule is content or the samples are used up."""
        task, main = self.task, self.processes.main
        with self._journal(output) as journal:
            try:
                certain = self._measure(journal, progress=progress)
            except KeyboardInterrupt:
                if output is not None and main:
                    done = f"{self.samples} of {task.tokens.samples} samples"
                    _say(f"interrupted after {done}: the same command goes on from there")
                raise
            if task.rule is not None and not certain and main:
                _say(f"not certain after {self.samples} samples. Give more with --samples")
            result = task.profile(self.values, certain)
            if output is not None and main:
                result.write(output)
                journal.remove()
        return result

    def _journal(self, output: Path | None) -> Journal:
        """The journal, of which the main process alone has the file; what it holds is measured for all."""
        path = output.with_name(output.name + ".partial") if output is not None and self.processes.main else None
        journal = Journal(path, self.task.identity(), resume=self.task.settings.resume)
        self.values = self.processes.from_main(list(self._kept(journal)))
        if journal.stale:
            _say(f"{path} was left by another command: starting anew")
        elif path is not None and self.values:
            _say(f"going on from {path}: {self.samples} of {self.task.tokens.samples} samples are measured")
        return journal

    def _kept(self, journal: Journal) -> Any:
        """The values of the first batches, as far as the journal holds them."""
        for number in range(len(self.task.batches)):
            values = self.task.values_in(number, journal.get(number)) if journal.has(number) else None
            if values is None:
                return
            yield values

    def _measure(self, journal: Journal, *, progress: bool) -> bool:
        """Measure the batches that are lacking; whether the rule is content."""
        task, hidden = self.task, None if progress and self.processes.main else True
        with tqdm(total=task.tokens.samples, initial=self.samples, unit=" samples", disable=hidden) as bar:
            while True:
                certain = task.settled(self.values)
                if certain or len(self.values) == len(task.batches):
                    return certain
                for values in self._measured(self._next_batches()):
                    number = len(self.values)
                    task.check(number, values)
                    journal.put(number, task.record(number, values))
                    self.values.append(values)
                    bar.update(len(values))

    def _next_batches(self) -> list[list[int]]:
        """The batches that are measured in one go.

        Up to the next look at most, so that how much is measured at once does not change where it ends.
        """
        done, task = len(self.values), self.task
        group = task.batches[done : done + self.measurer.at_once * self.processes.size]
        look = min([samples for samples in task.looks if samples > self.samples], default=task.tokens.samples)
        ends = self.samples + np.cumsum([len(batch) for batch in group])
        return group[: int(np.searchsorted(ends, look)) + 1]

    def _measured(self, group: list[list[int]]) -> list[Values]:
        """The values of every batch of ``group``, each measured by one of the processes."""
        rows, size = self.task.tokens.rows, self.processes.size
        mine = self.measurer.measure(
            [[rows[sample] for sample in batch] for batch in group[self.processes.rank :: size]]
        )
        every = self.processes.gather(mine)
        return [every[place % size][place // size] for place in range(len(group))]


def as_tokens(tokens: Any) -> Tokens:
    """What a caller of `profile` gives, as `Tokens`."""
    if isinstance(tokens, Tokens):
        return tokens
    if isinstance(tokens, Mapping) or hasattr(tokens, "input_ids"):
        return Tokens.from_padded(tokens["input_ids"], tokens.get("attention_mask"))
    return Tokens(tuple(np.asarray(row, dtype=np.int32) for row in tokens))


def _known(tokens: Tokens, config: Mapping[str, Any]) -> Tokens:
    """``tokens``, if the model has an embedding for each."""
    check_known(tokens.rows, decoder_fields(config).get("vocab_size"), tokens.source)
    return tokens
