"""Refit what the layers after a cut write to the residual stream, by ridge regression: nothing trains.

Layer by layer from the cut on, `o_proj` is solved for the whole model's state after attention and then `down_proj` for
the state that enters the whole model's next kept layer, each from what the layers repaired before it make. The result
is an ordinary checkpoint. Where a norm follows a projection, as in Gemma 2, that norm's weights are refitted as well.
Each weight's form and ridge are those that do best on text held out from the solve, and it stays as it is where none
does better. The last layer is then solved for what the whole model says (`lmprune.healing.last`). By lmprune; the solve
before the cut alone is near to ReplaceMe (arXiv 2505.02819).
"""

from __future__ import annotations

import math
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lmprune.cuts.plan import Plan
from lmprune.errors import DataError, ModelError, UsageError, UselessRepair
from lmprune.forward.batches import Batch, batches_of
from lmprune.forward.calls import evaluating
from lmprune.forward.experts import Experts
from lmprune.forward.machine import free_memory
from lmprune.forward.streaming import OneByOne
from lmprune.healing.experts import ExpertsSolver
from lmprune.healing.fitting import Parts, apart, fitted, gathered
from lmprune.healing.keeping import Kept, Refitted
from lmprune.healing.last import Last, kept_weights, put_back, room
from lmprune.healing.layerwise import Layerwise, OnDisk, Shelf
from lmprune.healing.norms import Norm
from lmprune.healing.readers import (
    Readers,
    head_map,
    head_target,
    is_tied,
    narrowing_of,
    readers_of,
    reading,
    solve_head,
)
from lmprune.healing.solving import AROUND, KEEP, SINGULAR, ZERO, Candidate, candidates, solve_as, unchanged
from lmprune.healing.together import can_be_joined, solve_together
from lmprune.healing.writers import Stage, Writer, set_weight, stages_of, weight_of, writing
from lmprune.models.stack import unwrapped

HELD = 5
"""Each fifth sample is held out from the solve, to choose by."""

_BATCH_TOKENS = 2048
KEPT_BYTES = 1 << 30
"""Inputs of a projection that fit are kept from one use to the next; larger ones are computed again."""
_WAITING = 6
"""Tensors as large as a state that wait for each token at most, with what enters a projection of held-out text."""
_SHARE = 0.3
"""Of the free memory that states may take; beyond it they wait on disk."""
TOGETHER = "together"
"""Solved with the other projections of its layer."""
DISTRIBUTION = "distribution"
"""Solved for the whole model's distribution over the next token: the last layer."""
_GAIN = 0.01
"""A layer gains where a weight's error on held-out text falls by more than this share of it."""
_PATIENCE = 2
"""So many layers without gain, one after the other, end the repair."""


class Options(Protocol):
    """What `methods.refit` lets a user choose."""

    @property
    def values(self) -> tuple[float, ...]: ...
    @property
    def what(self) -> str: ...
    @property
    def last_for(self) -> str: ...
    @property
    def until_layer(self) -> int | None: ...


@dataclass(frozen=True)
class RefitReport:
    """What a refit did.

    Attributes:
        projections: in the order in which they were solved.
        passes: what it cost in forward passes of its text through the whole model, parts of layers counted whole.
        notes: what the user should be told.
    """

    projections: tuple[Refitted, ...]
    tokens: int
    held_out_tokens: int
    seconds: float
    passes: float
    notes: tuple[str, ...] = field(default=())

    def to_data(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def refit(
    student: nn.Module | OneByOne,
    whole: nn.Module | OneByOne,
    plan: Plan,
    blocks: NDArray[np.int32] | Sequence[NDArray[np.int32]],
    options: Options,
    *,
    say: Callable[[str], None] = lambda text: None,
    kept: Kept | None = None,
) -> RefitReport:
    """Refit the live ``student``, which is ``whole`` without what ``plan`` drops, in place.

    Args:
        blocks: token ids, a sample each, of one length or of several.
        kept: where changed layers are kept as they come, so that a killed repair goes on; all that there is of the
            result where the models are read layer by layer.

    Raises:
        DataError: there are fewer than two samples.
        ModelError: something else than a linear map writes to the stream in a layer from the cut on.
        UsageError: the plan drops nothing, or the last layer to refit does not come after a cut.
        UselessRepair: a solve has no solution, and nothing else gains.
    """
    repair = _Refit(options, plan)
    with evaluated(student), evaluated(whole), torch.no_grad():
        return repair.run(student, whole, list(blocks), say, kept)


def evaluated(model: nn.Module | OneByOne) -> AbstractContextManager[None]:
    """Within the block it is in eval mode, as one that is read layer by layer always is."""
    return nullcontext() if isinstance(model, OneByOne) else evaluating(model)


def _first_touched(plan: Plan) -> int:
    """The first place of the cut model whose output should change: the layer before the first gap, or the first."""
    ends = [*plan.kept[1:], plan.layers]
    if plan.kept[0] != 0 or _is_narrower(plan):
        return 0
    for place, (layer, end) in enumerate(zip(plan.kept, ends)):
        if end != layer + 1:
            return place
    raise UsageError("this cut drops no layer, so that there is nothing to refit")


def _is_narrower(plan: Plan) -> bool:
    """Whether every layer has lost some of its width."""
    return any(part.kind == "width" for part in plan.parts)


def last_gap(plan: Plan) -> int:
    """The last place before which or after which layers are gone; of a narrower model the last of all."""
    if _is_narrower(plan):
        return len(plan.kept) - 1
    ends = [*plan.kept[1:], plan.layers]
    return max((place for place, (layer, end) in enumerate(zip(plan.kept, ends)) if end != layer + 1), default=0)


Outcome = tuple[str, "float | None", float, float, int]
"""Form, ridge, error before and after, tokens: as in `Refitted`."""


class Solver(Protocol):
    """Changes one projection."""

    def solve(self, *, all_text: bool = True) -> Outcome:
        """Change it for the better, or not at all; to what held-out text gives as well, unless it is to judge more."""


class Sequential(ABC):
    """A repair that goes from layer to layer, each on what the repaired layers before it make."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._first, self._last_gap = _first_touched(plan), last_gap(plan)
        self._batches: list[Batch] = []
        self._held: list[bool] = []
        self._done: list[Refitted] = []
        self._notes: list[str] = []
        self._refusals: list[ModelError] = []
        self._heads: Tensor | None = None

    @abstractmethod
    def solved(self, place: int, stages: Sequence[Stage]) -> Sequence[Stage]:
        """Which ``stages`` of layer ``place`` are solved; in each of them something can be."""

    @abstractmethod
    def solver(self, layer: nn.Module, writer: Writer, parts: Parts) -> Solver:
        """What solves one.

        Raises:
            ModelError: it cannot be solved.
        """

    @abstractmethod
    def before_cut(self, place: int, stages: Sequence[Stage], target: Shelf) -> None:
        """Change the layer before the first cut, which should leave ``target``, before its last stage is solved.

        Until there the student is the whole model.
        """

    @property
    def wants_last(self) -> bool:
        """Whether the last layer is, wherever the repair of states ends."""
        return False

    @abstractmethod
    def is_over(self, place: int, idle: int) -> bool:
        """Whether the repair ends before layer ``place``; the last ``idle`` layers gained nothing."""

    @abstractmethod
    def readers(self, place: int, group: Readers, inputs: Shelf) -> None:
        """Change what reads the narrower stream of layer ``place``.

        Args:
            inputs: what enters the same readers in the whole model, batch by batch.
        """

    @abstractmethod
    def after_layers(self) -> None:
        """Change what stands behind the last layer."""

    def run(
        self,
        student: nn.Module | OneByOne,
        whole: nn.Module | OneByOne,
        rows: list[NDArray[np.int32]],
        say: Callable[[str], None],
        kept: Kept | None = None,
    ) -> RefitReport:
        """Repair ``student`` in place; or, where it is read layer by layer, in what is ``kept`` of it.

        Layers that are kept already, of a run that was killed, are taken as they are.
        """
        began = time.monotonic()
        self._say, self._kept = say, kept
        self._streamed = student if isinstance(student, OneByOne) else None
        self._read(rows)
        shelf = self._shelf(student, kept)
        self._whole = Layerwise(whole, self._batches, shelf)
        self._student = Layerwise(student, self._batches, shelf)
        self._narrowing = narrowing_of(whole, self._plan)
        self._to_first()
        idle, over, count = 0, False, len(self._student.layers)
        for place in range(self._first, count):
            over = over or self.is_over(place, idle)
            if over and not self.wants_last:
                break
            if over and place < count - 1:
                self._pass_both(place)
                continue
            idle = 0 if self._layer(place, over) else idle + 1
        else:
            self.after_layers()
        if not self._done and self._refusals:
            raise self._refusals[0]
        self._require_solution()
        self._notes += [f"{str(refusal).partition('. ')[0]}: it stays as it is" for refusal in self._refusals]
        tokens = [int(batch.lengths.sum()) for batch in self._batches]
        held = sum(count for count, part in zip(tokens, self._held) if part)
        seconds = round(time.monotonic() - began, 1)
        passes = (self._whole.runs + self._student.runs) / (len(self._batches) * len(self._whole.layers))
        return RefitReport(tuple(self._done), sum(tokens), held, seconds, round(passes, 2), tuple(self._notes))

    def _require_solution(self) -> None:
        """Refuse what changed nothing where a solve had no solution.

        Raises:
            UselessRepair: it is so.
        """
        stuck = next((done for done in self._done if done.form == SINGULAR), None)
        if stuck is not None and all(done.form in (SINGULAR, KEEP) for done in self._done):
            raise UselessRepair(
                f"layer {stuck.layer} {stuck.path}: {stuck.tokens:,} tokens leave the solve singular, and no other "
                "projection gains. Give more text, and less alike, or a larger ridge. Nothing was written"
            )

    def _shelf(self, student: nn.Module | OneByOne, kept: Kept | None) -> Callable[[], Shelf]:
        """Where states wait: on disk where they would take much of the memory that is free, or of a streamed model."""
        model = student.model if isinstance(student, OneByOne) else student
        width = int(unwrapped(model).config.get_text_config().hidden_size)
        wanted = 4 * width * sum(batch.ids.numel() for batch in self._batches) * _WAITING
        self._on_disk = kept is not None and (isinstance(student, OneByOne) or wanted > _SHARE * free_memory())
        if not self._on_disk:
            return list
        assert kept is not None
        folder = kept.folder / "states"
        shutil.rmtree(folder, ignore_errors=True)
        return partial(OnDisk, folder)

    def _read(self, rows: list[NDArray[np.int32]]) -> None:
        """Samples to batches, of which some are held out."""
        if len(rows) < 2:
            raise DataError(f"a repair needs at least 2 samples of text, and there is {len(rows)}. Give more")
        held = set(range(HELD - 1, len(rows), HELD)) or {len(rows) - 1}
        for part in (False, True):
            chosen = [np.asarray(row) for number, row in enumerate(rows) if (number in held) == part]
            size = max(1, _BATCH_TOKENS // max(map(len, chosen)))
            for numbers in batches_of([len(row) for row in chosen], size):
                self._batches.append(Batch.of([chosen[number] for number in numbers], torch.device("cpu")))
                self._held.append(part)

    def _to_first(self) -> None:
        """Both models to the first layer that changes. What they have in common is computed once."""
        for model in (self._whole, self._student):
            model.begin()
        same = all(map(torch.equal, self._whole.states, self._student.states))
        for place in range(self._first):
            layer = self._plan.kept[place]
            same = self._are_equal(layer, place) and same
            self._whole.pass_on(layer)
            if same:
                self._student.put(self._whole.states)
            else:
                self._student.pass_on(place)
        self._same = self._are_equal(self._plan.kept[self._first], self._first) and same and self._plan.kept[0] == 0
        for layer in range(self._plan.kept[0] if self._first == 0 else 0):
            self._whole.pass_on(layer)

    def _are_equal(self, layer: int, place: int) -> bool:
        """Whether that layer of the whole model and that of the student have the same weights."""
        if self._first == 0 and self._plan.kept[0] != 0:  # it has not come to that layer yet
            return False
        with self._student.holding(place) as ours, self._whole.holding(layer) as theirs:
            return _equal(theirs, ours)

    # --- one layer --------------------------------------------------------------------------------------------------

    def _pass_both(self, place: int) -> None:
        """Pass both models on through a layer of the student, and through what was cut away behind it."""
        for left in range(self._plan.kept[place], self._end(place)):
            self._whole.pass_on(left)
        self._student.pass_on(place)

    def _end(self, place: int) -> int:
        """The layer of the whole model before which it stands once the student has passed ``place``."""
        return self._plan.kept[place + 1] if place + 1 < len(self._plan.kept) else self._plan.layers

    def _layer(self, place: int, over: bool = False) -> bool:
        """Refit one layer and pass both models on; whether it gained.

        Where the repair of states is ``over``, the last layer is solved for the whole model's distribution alone.
        """
        layer, end = self._plan.kept[place], self._end(place)
        try:
            with self._student.holding(place) as module:
                stages = stages_of(self._student, place, self._probe(self._student))
                groups = self._groups(place, stages)
                names = {n for stage in stages for writer in stage.writers for n in writer.changed(module)}
                names |= {n for group in groups for n in group.changed(module)}
        except ModelError as exc:
            self._refusals.append(exc)
            self._pass_both(place)
            return False
        if self._streamed is not None:
            self._streamed.check_stored(place, names)
        alike = place == self._first and self._same
        solved = list(self.solved(place, [stage for stage in stages if stage.writers]))
        if alike:  # until the last stage before the cut there is nothing to mend
            solved = solved[-1:]
        solved = [] if over else solved
        last = place == len(self._student.layers) - 1 and self.wants_last
        last = last and stages[-1].plain and not stages[-1].writers[0].experts
        known = self._kept.of(layer) if self._kept is not None else None
        entered: dict[Readers, Shelf] = {group: self._whole.shelf() for group in groups}
        targets = self._targets(layer, end, stages, solved, entered)
        with self._student.holding(place) as module:
            if known is not None:
                known.put_into(module)
                self._done += known.done
                return self._pass_student(place, stages, solved) or known.gained
            before = len(self._done)
            if alike and solved:
                self.before_cut(place, stages, targets[solved[-1]])
            inputs = None
            for stage in solved:
                for group in [group for group in entered if group.before <= stages.index(stage)]:
                    self.readers(place, group, entered.pop(group))
                for writer in stage.writers:
                    inputs = self._inputs(place, stages, stage, writer)
                    if last and stage is stages[-1]:
                        self._last(layer, place, writer, inputs, targets[stage])
                    else:
                        self._projection(layer, place, writer, inputs, targets[stage])
            if last and stages[-1] not in solved:
                inputs = self._inputs(place, stages, stages[-1], stages[-1].writers[0])
                self._last(layer, place, stages[-1].writers[0], inputs, None)
            done = self._done[before:]
            gained = any(each.after < (1 - _GAIN) * each.before for each in done if each.form != TOGETHER)
            if self._kept is not None and (solved or last):
                self._kept.keep(layer, module, names, done, gained)
            self._pass_student(place, stages, solved, inputs)
        return gained

    def _last(self, layer: int, place: int, writer: Writer, inputs: _Inputs, targets: Shelf | None) -> None:
        """Solve the last projection for the whole model's distribution, from its solution for ``targets``."""
        module, before = self._student.layers[place], len(self._done)
        ends = [writer.linear(module), *([module.get_submodule(writer.norm)] if writer.norm else [])]
        untouched = kept_weights(ends)
        if targets is not None:  # on the fit alone, or held-out text could not judge what comes after it
            self._projection(layer, place, writer, inputs, targets, all_text=False)
        found = Last(self._student, self._whole, writer, inputs, self._batches, self._held).solve()
        gained = found.after < found.before
        if targets is not None and not gained:
            put_back(ends, untouched)
            del self._done[before:]
            self._projection(layer, place, writer, inputs, targets)
        form = DISTRIBUTION if gained else KEEP
        self._done.append(Refitted(layer, writer.path, form, None, found.before, found.after, found.tokens))
        self._say(
            f"layer {layer} {writer.path}: for the distribution, {found.before:.4f} -> {found.after:.4f} nats a token "
            "from the whole model's"
        )

    def _note_once(self, note: str) -> None:
        if note not in self._notes:
            self._notes.append(note)
            self._say(note)

    def _pass_student(
        self, place: int, stages: Sequence[Stage], solved: Sequence[Stage], inputs: _Inputs | None = None
    ) -> bool:
        """Pass the student on through its changed layer; what enters its last projection may be there already."""
        if solved and solved[-1] is stages[-1]:
            writer = stages[-1].writers[-1]
            inputs = inputs or self._inputs(place, stages, stages[-1], writer)
            self._student.put(inputs.outputs())
        else:
            self._student.pass_on(place)
        return False

    def _groups(self, place: int, stages: Sequence[Stage]) -> list[Readers]:
        """What reads a narrower stream in layer ``place``."""
        if self._narrowing is None:
            return []
        return readers_of(self._student, place, self._probe(self._student), stages)

    def _inputs(self, place: int, stages: Sequence[Stage], stage: Stage, writer: Writer) -> _Inputs:
        """What enters one of its projections. Until it has been asked for, nothing is computed."""
        return _Inputs(self._student, place, stages, stage, writer, self._held, on_disk=self._on_disk)

    def _probe(self, model: Layerwise) -> Tensor:
        length = model.probe.ids.shape[1]
        return model.states[0][:1, :length]

    def _targets(
        self,
        layer: int,
        end: int,
        stages: Sequence[Stage],
        solved: Sequence[Stage],
        entered: dict[Readers, Shelf],
    ) -> dict[Stage, Shelf]:
        """For each stage that is solved, batch by batch, the whole model's state once it has written.

        The whole model goes on to ``end``. The last stage that is solved also stands for the layers that are gone, and
        leaves what the stages after it write in the whole model. Of a narrower stream it is what of that state the
        student should have; what enters readers goes to ``entered``.
        """
        targets: dict[Stage, Shelf] = {stage: self._whole.shelf() for stage in solved}
        last = solved[-1] if solved else None
        later = stages[stages.index(last) + 1 :] if last is not None else []
        written_later = self._whole.shelf()
        watched = [stage for stage in (stages if later else stages[:-1]) if last is not None]
        with self._whole.holding(layer) as module:
            for number in range(len(self._whole.states)):
                hidden = self._whole.states[number]
                left: dict[Stage, list[Tensor]] = {stage: [] for stage in watched}
                with writing(module, left), reading(module, entered):
                    self._whole.states[number] = self._whole.run(layer, number, hidden).cpu()
                state = hidden
                for stage, (output,) in left.items():
                    state = state + output.view_as(state)
                    if stage in targets and stage is not last:
                        targets[stage].append(self._wanted(state))
                if later:
                    more = (left[stage][0].view_as(state) for stage in later)
                    written_later.append(sum(more, torch.zeros_like(state)))
        for gone in range(layer + 1, end):
            self._whole.pass_on(gone)
        if last is not None:
            for number, wanted in enumerate(self._whole.states):
                state = self._wanted(wanted - written_later[number] if later else wanted)
                targets[last].append(self._heard(number, state) if end == self._plan.layers and not later else state)
        return targets

    def _wanted(self, states: Tensor) -> Tensor:
        """What the student's state should be where the whole model's is ``states``."""
        return states if self._narrowing is None else self._narrowing.narrowed(states)

    def _heard(self, number: int, state: Tensor) -> Tensor:
        """What should leave the last layer: ``state``, or what a head that shares its weights hears."""
        if self._narrowing is None or not is_tied(self._student.model):
            return state
        if self._heads is None:
            ours, theirs = (model.model.get_output_embeddings().weight for model in (self._student, self._whole))
            self._heads = head_map(ours, theirs)
        normed = self._whole.after(number, self._whole.states[number])
        return head_target(self._heads, normed, state.to(normed).norm(dim=-1, keepdim=True)).cpu()

    def _parts(self, writer: Writer, inputs: _Inputs, targets: Shelf, device: torch.device) -> Parts:
        """Without padding: the inputs, and what should be added to them."""

        def parts(held: bool) -> Iterator[tuple[Tensor, Tensor]]:
            for number, batch in self._of(held):
                entered, before = inputs[number]
                wanted = (targets[number] - before) / writer.factor
                yield batch.real(entered).to(device), batch.real(wanted).to(device)

        return parts

    def _of(self, held: bool) -> Iterator[tuple[int, Batch]]:
        """The batches that are held out, or the others, with their numbers."""
        return ((number, self._batches[number]) for number, part in enumerate(self._held) if part == held)

    def _error(self, inputs: _Inputs, targets: Shelf) -> float:
        """The squared distance of what leaves the layer from ``targets`` on held-out text."""
        return sum(
            float(batch.real(inputs.output(number) - targets[number]).double().square().sum())
            for number, batch in self._of(True)
        )

    def _projection(
        self, layer: int, place: int, writer: Writer, inputs: _Inputs, targets: Shelf, *, all_text: bool = True
    ) -> Refitted:
        """Solve one projection, and put the best of what was tried into the student."""
        module = self._student.layers[place]
        linear = writer.linear(module)
        device = next(module.parameters()).device

        parts = self._parts(writer, inputs, targets, device)
        form, ridge, before, after, tokens = self.solver(module, writer, parts).solve(all_text=all_text)
        done = Refitted(layer, writer.path, form, ridge, before, after, tokens)
        width = Experts(linear, writer.experts).inner if writer.experts else len(weight_of(linear))
        if tokens < width and not self._notes:
            self._notes.append(
                f"{tokens:,} tokens for the {width:,} inputs of {writer.path}: the ridge carries it; "
                f"{4 * width:,} would do"
            )
            self._say(self._notes[-1])
        self._say(f"layer {layer} {writer.path}: {form}, error {before:.3f} -> {after:.3f}")
        self._done.append(done)
        return done


class _Refit(Sequential):
    def __init__(self, options: Options, plan: Plan) -> None:
        super().__init__(plan)
        self._options = options
        until, first = options.until_layer, plan.kept[self._first]
        if until is not None and not first <= until < plan.layers:
            raise UsageError(f"--until-layer {until}: this cut is refitted from layer {first} to {plan.layers - 1}")

    def solved(self, place: int, stages: Sequence[Stage]) -> Sequence[Stage]:
        return stages if self._options.what == "both" else stages[-1:]

    def solver(self, layer: nn.Module, writer: Writer, parts: Parts) -> Solver:
        linear, ridges = writer.linear(layer), self._options.values
        if writer.experts:
            return ExpertsSolver(Experts(linear, writer.experts), parts, ridges)
        if not writer.norm:
            return _Plain(linear, parts, ridges)
        return _Normed(linear, layer.get_submodule(writer.norm), parts, ridges)

    def readers(self, place: int, group: Readers, inputs: Shelf) -> None:
        """Solve each anew for what the whole model's makes of its own normed states."""
        assert self._narrowing is not None, "it is asked of narrower streams alone"
        layer = self._student.layers[place]
        device = next(layer.parameters()).device
        first = Writer(group.paths[0], "", 1.0)
        alone = Stage(first.path, 1.0, (first,), True)
        ours = self._inputs(place, [alone], alone, first)

        def parts(theirs: nn.Module, held: bool) -> Iterator[tuple[Tensor, Tensor]]:
            for number, batch in self._of(held):
                yield batch.real(ours[number][0]).to(device), theirs(batch.real(inputs[number]).to(device))

        for path in group.paths:
            like = partial(parts, self._narrowing.reader(self._plan.kept[place], path))
            found = _Plain(layer.get_submodule(path), like, self._options.values).solve()
            self._done.append(Refitted(self._plan.kept[place], path, *found))

    def after_layers(self) -> None:
        """Solve a head of its own anew; one that shares its weights is what the last projection aimed at."""
        if self._narrowing is None or is_tied(self._student.model):
            return
        head, theirs = (model.model.get_output_embeddings() for model in (self._student, self._whole))
        if head is None:
            return

        def parts(held: bool) -> Iterator[tuple[Tensor, Tensor]]:
            for number, batch in self._of(held):
                ours = self._student.after(number, self._student.states[number])
                yield batch.real(ours), batch.real(self._whole.after(number, self._whole.states[number]))

        found = solve_head(head, theirs, parts, self._options.values)
        if self._kept is not None:
            self._kept.keep_head(head)
        self._done.append(Refitted(self._plan.kept[-1], "head", *found.outcome))
        self._say(f"head: {found.form}, error {found.before:.3f} -> {found.after:.3f}")

    def before_cut(self, place: int, stages: Sequence[Stage], target: Shelf) -> None:
        """Solve all projections together, where that leaves less to be wished than the last alone."""
        writers = [writer for stage in stages for writer in stage.writers]
        if self._options.what != "both" or not can_be_joined(stages):
            return
        layer = self._student.layers[place]
        device = next(layer.parameters()).device
        linears = [writer.linear(layer) for writer in writers]
        untouched = kept_weights(linears)

        def alone() -> float:
            """The error on held-out text once the last projection is solved for it, on the other text."""
            inputs = self._inputs(place, stages, stages[-1], writers[-1])
            self.solver(layer, writers[-1], self._parts(writers[-1], inputs, target, device)).solve(all_text=False)
            return self._error(inputs, target)

        entered = [self._inputs(place, stages, *each) for each in zip(stages, writers)]

        def parts(held: bool) -> Iterator[tuple[list[Tensor], Tensor]]:
            for number, batch in self._of(held):
                wanted = (target[number] - self._student.states[number]) / writers[0].factor
                yield [batch.real(each[number][0]).to(device) for each in entered], batch.real(wanted).to(device)

        without = alone()
        put_back(linears, untouched)
        found = solve_together(layer, writers, parts, self._options.values)
        entered.clear()
        # The last is solved again, and around what it was: around what it has just become it would drift.
        put_back(linears[-1:], untouched[-1:])
        kept = kept_weights(linears)
        together = alone() if found is not None else without
        better = together < without
        tokens = sum(int(batch.lengths.sum()) for batch in self._batches)
        put_back(linears, kept if better else untouched)
        if better and found is not None:
            self._say(f"layer {self._plan.kept[place]}: all projections together, ridge {found[1]:g}")
            self._done += [
                Refitted(self._plan.kept[place], writer.path, TOGETHER, found[1], 1.0, together / without, tokens)
                for writer in writers[:-1]
            ]

    @property
    def wants_last(self) -> bool:
        until, ridges = self._options.until_layer, self._options.values
        return (
            self._options.last_for == "distribution"
            and (self._narrowing is None or is_tied(self._student.model))
            and (until is None or until >= self._plan.kept[-1])
            and not all(map(math.isinf, ridges))
            and self._has_room()
        )

    def _has_room(self) -> bool:
        """Whether the vocabulary is small enough to solve the last layer for all of it."""
        vocabulary = getattr(unwrapped(self._whole.model).config.get_text_config(), "vocab_size", None)
        if vocabulary is None:
            return False
        if room(vocabulary, next(self._student.model.parameters()).device):
            return True
        self._note_once(
            f"{vocabulary:,} tokens to choose from are many for this device: the last layer is solved for states"
        )
        return False

    def is_over(self, place: int, idle: int) -> bool:
        until = self._options.until_layer
        if until is not None:
            return self._plan.kept[place] > until
        return idle >= _PATIENCE and place > self._last_gap


class _Plain:
    """A projection that writes to the stream as it is."""

    def __init__(self, linear: nn.Module, parts: Parts, ridges: Sequence[float]) -> None:
        self._linear, self._parts, self._ridges = linear, parts, ridges

    def solve(self, *, all_text: bool = True) -> Outcome:
        bias = self._linear.bias is not None
        found = fitted(self._parts, weight_of(self._linear), self._ridges, bias=bias, all_text=all_text)
        if found.ridge is not None:
            set_weight(self._linear, found.weight)
        return found.outcome


class _Normed:
    """A projection whose output goes through a norm before it is added.

    The norm takes away the size of what the projection makes, so that its weights are refitted as well. A projection
    is solved for what should be added, from zero, or for what the norm should be given, with each token's size held as
    it is, around the old weight.
    """

    def __init__(self, linear: nn.Module, norm: nn.Module, parts: Parts, ridges: Sequence[float]) -> None:
        self._linear, self._norm, self._parts, self._ridges = linear, Norm(norm), parts, ridges

    def solve(self, *, all_text: bool = True) -> Outcome:
        old = weight_of(self._linear)
        bias = self._linear.bias is not None
        width = old.shape[1]
        gathering = gathered(self._doubled(False), inputs=len(old) - bias, outputs=2 * width, bias=bias)
        fit = gathering.settled()
        found = [Candidate(KEEP, None, old)]
        for form, start, held_out in ((ZERO, 0, self._unbiased), (AROUND, width, self._inside)):
            # The ridge by what goes into the norm: a pass over the text for each of them would take long.
            tried: list[tuple[float, Candidate]] = []
            for candidate in candidates(fit.outputs(start, start + width), old, self._ridges, (form,)):
                tried.append((apart(held_out(True), candidate.weight, bias=bias)[0], candidate))
                tried = [min(tried, key=lambda each: each[0])]
            found += [candidate for _, candidate in tried]
        gains = [[self._norm.sums() for _ in range(2)] for _ in found]
        tokens = 0
        for held in (False, True):
            for inputs, wanted in self._unbiased(held):
                tokens += len(inputs)
                for candidate, both in zip(found, gains):
                    set_weight(self._linear, candidate.weight)
                    both[held].add(self._norm.unit(self._linear(inputs)), wanted)
        choices = []
        for candidate, (fitted_on, judged_on) in zip(found, gains):
            for refitted in (False, True):
                gain = fitted_on.best() if refitted else self._norm.gain
                choices.append((judged_on.error(gain), candidate, refitted))
        error, best, refitted = min(choices, key=lambda choice: choice[0])
        form = best.form if best.ridge is not None else unchanged(self._ridges, solved=len(found) > 1)
        form += "+norm" if refitted else ""
        if not all_text:
            set_weight(self._linear, best.weight)
            if refitted:
                self._norm.set_gain(next(g for c, (g, _) in zip(found, gains) if c is best).best())
            return form, best.ridge, choices[0][0], error, tokens
        set_weight(self._linear, old)
        if best.form != KEEP:
            every = gathered(self._doubled(True), gathering).settled()
            part = every.outputs(0, width) if best.form == ZERO else every.outputs(width, 2 * width)
            set_weight(self._linear, solve_as(best, part, old).weight)
        if refitted:
            again = self._norm.sums()
            for held in (False, True):
                for inputs, wanted in self._unbiased(held):
                    again.add(self._norm.unit(self._linear(inputs)), wanted)
            self._norm.set_gain(again.best())
        return form, best.ridge, choices[0][0], error, tokens

    def _doubled(self, held: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """What should be added, and beside it what the norm should be given."""
        for inputs, wanted in self._unbiased(held):
            yield inputs, torch.cat([wanted, self._norm.undone(self._linear(inputs), wanted)], dim=1)

    def _inside(self, held: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """What the norm should be given, by the size of what the projection makes as it is."""
        for inputs, wanted in self._unbiased(held):
            yield inputs, self._norm.undone(self._linear(inputs), wanted)

    def _unbiased(self, held: bool) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, wanted in self._parts(held):
            yield inputs, self._norm.before_bias(wanted)


class _Inputs:
    """For each batch what enters a projection of a layer and the state until then, with padding.

    Kept where they fit, so that the layer runs once for all that wants them; of held-out text always, since every
    candidate is judged on it.
    """

    def __init__(
        self,
        model: Layerwise,
        place: int,
        stages: Sequence[Stage],
        stage: Stage,
        writer: Writer,
        held: Sequence[bool],
        *,
        on_disk: bool,
    ) -> None:
        self._model, self._place, self._stage, self._writer = model, place, stage, writer
        self._before = stages[: stages.index(stage)]
        self._layer, self._held = model.layers[place], held
        self._room = math.inf if on_disk else KEPT_BYTES
        self._kept: dict[int, int] = {}
        self._entered, self._states = model.shelf(), model.shelf()

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        if number not in self._kept:
            return self._computed(number, self._model.states[number])
        place = self._kept[number]
        return self._entered[place], self._states[place]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[number] for number in range(len(self._model.states)))

    def _computed(self, number: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        layer, writer = self._layer, self._writer
        left: dict[Stage, list[Tensor]] = {stage: [] for stage in self._before}
        if self._stage.plain:
            with writing(layer, left):
                entered = self._model.run(self._place, number, hidden, until=partial(writer.entered, layer)).cpu()
        else:  # what else the stage writes has to be known
            left[self._stage], caught = [], list[Tensor]()
            with writing(layer, left), writer.entered(layer, caught.append):
                self._model.run(self._place, number, hidden)
            entered = caught[0].cpu()
        entered = entered.reshape(*hidden.shape[:2], -1)
        state = hidden
        for (output,) in left.values():
            state = state + output.view_as(state)
        if not self._stage.plain:
            device = next(layer.parameters()).device
            state = state - writer.adds(layer, entered.to(device)).cpu().view_as(state)
        if self._held[number] or self._room >= entered.nbytes + state.nbytes:
            self._room -= 0 if self._held[number] else entered.nbytes + state.nbytes
            self._kept[number] = len(self._kept)
            self._entered.append(entered)
            self._states.append(state)
        return entered, state

    def output(self, number: int) -> Tensor:
        """What leaves the layer of one batch, its last projection being this one, as it is now."""
        device = next(self._layer.parameters()).device
        entered, before = self[number]
        return before + self._writer.adds(self._layer, entered.to(device)).cpu().view_as(before)

    def outputs(self) -> Iterator[Tensor]:
        """The same of all."""
        return (self.output(number) for number in range(len(self._model.states)))


def _equal(a: nn.Module, b: nn.Module) -> bool:
    """Whether two layers have the same weights."""
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name].to(ours[name])) for name in ours)
