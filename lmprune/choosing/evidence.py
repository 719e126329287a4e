"""The evidence that criteria ask for, made by forward passes when they ask, and kept."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmprune.criteria.settings import ChoiceSettings
from lmprune.cuts.plan import Plan, checked_layers
from lmprune.errors import DataError, ModelError, RecipeError, UsageError, sized
from lmprune.models.cut import Cut
from lmprune.profiling.distances import Profile
from lmprune.profiling.sequential import Race
from lmprune.profiling.settings import ProfileSettings
from lmprune.text.sources import DataSettings

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from lmprune.forward.journal import Journal
    from lmprune.forward.loss import Losses
    from lmprune.forward.measures import Measures
    from lmprune.forward.processes import Processes
    from lmprune.text.tokens import Tokens


_say = logging.getLogger("lmprune").info
LOSS = "loss"
"""The objective of a criterion that names none."""
FEW = 32
"""Samples for a quick look."""
LEAST_JUDGED = 8
"""Samples apart, on which what was chosen is judged; or where that is more:"""
JUDGED, JUDGED_AFTER = 0.5, 2.0
"""So many times the samples that losses are measured on; after repairs, beside which judging takes little."""


class ModelEvidence:
    """`lmprune.criteria.Evidence` of ``cut``, made by forward passes when it is asked for, and kept.

    Args:
        settings: how states are measured, and on how many samples; losses are measured on the first of these.
        data: the calibration text.
        known: a profile of the model, instead of making one.
        profile_file: where a profile that is made is kept, and found again if it is the one that would be made.
        protect: layers that must stay; -1 is the last.
        how: by what cuts are judged.
        journal_file: where losses are kept as they come, so that a killed search goes on.
    """

    def __init__(
        self,
        cut: Cut,
        settings: ProfileSettings | None = None,
        data: DataSettings | None = None,
        *,
        known: Profile | None = None,
        profile_file: Path | None = None,
        protect: Iterable[int] = (),
        how: ChoiceSettings | None = None,
        journal_file: Path | None = None,
    ) -> None:
        if known is not None and known.layers != cut.layers:
            raise RecipeError(f"this is a profile of {known.layers} layers, but {cut.name} has {cut.layers}")
        if known is not None and known.fingerprint not in (None, cut.fingerprint):
            raise RecipeError(f"this profile was made from other weights than those of {cut.name}")
        self.cut, self.layers = cut, cut.layers
        self._settings, self._data = settings or ProfileSettings(), data or DataSettings()
        self._known: dict[Plan | None, Profile] = {None: known} if known is not None else {}
        self._profiles: dict[Plan | None, Profile] = dict(self._known)
        self.how = how or ChoiceSettings()
        self.after = self.how.after
        self.objective = self.judging = self.how.objective or LOSS
        self._few = False
        judged = JUDGED if self.after is None else JUDGED_AFTER
        self._profile_file = profile_file
        self._lab = _Lab(cut, self._settings, self._data, journal_file, self.how, judged=judged)
        needed = cut.plan.needed if cut.plan is not None else frozenset()
        self.protected = checked_layers(protect, cut.layers, "--protect") | needed
        self.seed = self._settings.seed

    def prepare(self) -> None:
        """Load the model and read the text now, not when the first question comes."""
        _ = self._lab.measures

    def fresh(self) -> ModelEvidence:
        """The same of the same loaded model, with nothing measured yet."""
        other = copy.copy(self)
        other._profiles = dict(self._known)
        other._lab = self._lab.fresh()
        return other

    def by(self, objective: str, judging: str | None = None) -> ModelEvidence:
        """The same by another objective; what is measured is kept by both.

        Args:
            judging: by which unseen text is judged, where that has something to measure of it.
        """
        from lmprune.forward.objectives import parse_objective

        parse_objective(objective), parse_objective(judging or objective)
        other = copy.copy(self)
        other.objective, other.judging = objective, judging or objective
        return other

    def _judge(self) -> str:
        """What unseen text is judged by."""
        if self.judging != self.objective and not self._lab.measures.has(self.judging):
            _say(f"{self.judging}: there is too little of it in this text, so cuts are judged by {self.objective}")
            self.judging = self.objective
        return self.judging

    def repaired(self, plan: Plan) -> ModelEvidence:
        """See `Evidence`."""
        if self.after is None or not plan.dropped:
            return self
        other = copy.copy(self)
        other.after, other._lab = None, self._lab.repaired(plan)
        return other

    def check_repair(self, repairs: int | None) -> None:
        """Refuse, before anything is measured, a repair that cannot be made here; say what so many of them take.

        Raises:
            UsageError: it is none, or the weights are not in memory as they are.
        """
        from lmprune.choosing.repairing import known_repair, tokens_wanted

        assert self.after is not None, "no repair was asked for"
        way, how = known_repair(self.after), self._settings
        if how.quantization or how.device_map or how.stream:
            raise UsageError(f"--after {self.after}: it works on the weights as they are, on one device. Load them so")
        if repairs is None or repairs > 0:
            some = "cuts are" if repairs is None else "1 cut is" if repairs == 1 else f"{repairs} cuts are"
            _say(
                f"--after {self.after}: {some} repaired, on {tokens_wanted(way):,} tokens each; one costs about two "
                "passes of the whole model over them, and the solves, in float32 and with a second copy of the weights"
            )

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self._lab.processes.main

    @property
    def streams(self) -> bool:
        """Whether the model is read layer by layer."""
        return self._lab.streams

    def in_float32(self, *, at_speed: bool = False) -> ModelEvidence:
        """The same of a model in float32, as what is solved needs it, with text to repair on.

        Where it and a second one do not fit in memory, or ``stream`` is asked for, their weights wait in files.

        Args:
            at_speed: speeds will be measured, which files do not allow: they are chosen only where asked for.

        Raises:
            UsageError: another type or few bits are asked for, or another repair.
        """
        for name in ("dtype", "quantization", "device_map"):
            asked = getattr(self._settings, name)
            if asked not in (None, "auto", "float32"):
                raise UsageError(
                    f"--{name.replace('_', '-')} {asked}: what is refitted is held in float32, as a whole. Leave it out"
                )
        if self.after not in (None, "refit"):
            raise UsageError(f"--after {self.after}: what is narrower is repaired by refit. Leave it out")
        other = copy.copy(self)
        other._settings, other.how = (
            replace(self._settings, dtype="float32", stream=False),
            replace(self.how, after="refit"),
        )
        other.after = None  # each trial is repaired by itself
        beside = self._lab._journal_file
        files = (beside.parent if beside is not None else Path.cwd()) if self._is_short(at_speed) else None
        other._lab = _Lab(self.cut, other._settings, self._data, beside, other.how, files)
        return other

    def _is_short(self, at_speed: bool) -> bool:
        """Whether weights in float32 wait in files: as asked, or where the model and a second one have no room."""
        from lmprune.forward.machine import fits, free_memory, pick_device, weights_bytes
        from lmprune.forward.streaming import has_apart

        device, asked = pick_device(self._settings.device), self._settings.stream
        if asked and device.type != "cpu":
            raise UsageError(f"--stream: what is refitted then waits in files, and not on {device}. Give --device cpu")
        weights = 2 * weights_bytes(self.cut, 4)
        if asked is not None or at_speed or device.type != "cpu" or fits(weights, device) or not has_apart(self.cut):
            return bool(asked)
        _say(
            f"the model and a smaller one take up to {sized(weights)} and {sized(free_memory(device))} are free: their "
            "weights wait in files (--stream)"
        )
        return True

    @property
    def in_files(self) -> bool:
        """Whether the weights wait in files."""
        return self._lab.files is not None

    def of_changed(self, plan: Plan, runs: Callable[[], nn.Module], name: str) -> tuple[float, float]:
        """The losses of a changed model that ``plan`` leaves, on the text that is chosen on and on unseen text.

        Args:
            runs: gives it, once there is something to measure.
            name: what was done to it, for the journal.
        """
        changed = self._lab.measures.on(plan, runs, name)
        chosen, judged = (changed.losses(self.objective, [plan], judged=half).mean() for half in (False, True))
        return float(chosen[0]), float(judged[0])

    @property
    def model(self) -> PreTrainedModel:
        """The live model."""
        return self._lab.model

    @property
    def rest(self) -> Tokens:
        """Text to repair on."""
        return self._lab.texts.rest

    @property
    def journal(self) -> Journal:
        """Where losses are kept as they come, under keys that begin with an objective's name."""
        return self._lab.journal

    def on_few(self) -> ModelEvidence:
        """The same, measured on the first few samples alone."""
        other = copy.copy(self)
        other._few = True
        return other

    def close(self, *, done: bool = False) -> None:
        """Let others have the journal; when ``done``, what it was kept for is written, and it is removed."""
        self._lab.close(done)

    @property
    def text(self) -> Tokens:
        """What is chosen on."""
        return self._lab.texts.chosen_on

    @property
    def losses_asked(self) -> int:
        """How many plans' losses were asked for."""
        return self._lab.measures.asked if self._lab.measured else 0

    @property
    def passes(self) -> float:
        """Layers that losses took, in passes of the whole model over the text that is chosen on."""
        return self._lab.measures.passes if self._lab.measured else 0.0

    @property
    def profiles_made(self) -> int:
        """Profiles that were not given."""
        return len(self._profiles) - len(self._known)

    @property
    def read_nothing(self) -> bool:
        """Whether neither text nor the settings of a measurement have had any meaning so far."""
        return not self._lab.read and not self.profiles_made

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._lab.loaded

    @property
    def has_profile(self) -> bool:
        """Whether the model's own profile is there already."""
        return None in self._profiles

    def profile(self, plan: Plan | None = None) -> Profile:
        """See `Evidence`."""
        from lmprune.profiling.run import profile_model

        if plan not in self._profiles:
            _require_own_code_stays(self.cut)
            path = self._profile_file if plan is None else None
            cut = self.cut.without(plan, self.cut.name)
            # What is judged on stays unseen, also where the text is short.
            how = replace(self._lab.settings, samples=self._lab.measured_on)
            self._profiles[plan] = profile_model(cut, path, how, self._data, reuse=True, live=self._live(plan))
        return self._profiles[plan]

    def _live(self, plan: Plan | None) -> nn.Module | None:
        """What ``plan`` leaves of the loaded model; None where it is not loaded, and once is all that it is needed."""
        from lmprune.forward.views import pruned_view

        again = plan is not None and _room(self.cut, self._lab.settings)[0]
        if self._settings.stream or not (self._lab.loaded or again):
            return None
        return pruned_view(self._lab.model, plan)

    def losses(self, plans: Sequence[Plan]) -> Losses:
        """See `Evidence`."""
        return self._lab.measures.losses(self.objective, plans, samples=FEW if self._few else None)

    def ranked(self, plans: Sequence[Plan]) -> NDArray[np.float64]:
        """See `Evidence`."""
        every = self.how.exact or self._lab.streams  # which reads the whole model once for each look
        return self._lab.measures.ranked(self.objective, plans, None if every else Race().losers)

    def judged(self, plans: Sequence[Plan], *, samples: int | None = None) -> Losses:
        """See `Evidence`; on about so many samples, if not on all."""
        return self._lab.measures.losses(self._judge(), plans, judged=True, samples=samples)

    def judged_repaired(self, plans: Sequence[Plan]) -> Losses:
        """See `Evidence`; one repaired model at a time is in memory."""
        from lmprune.forward.loss import Losses

        if self.after is None:
            return self.judged(plans)
        return Losses.stacked([self.repaired(plan).judged([plan]) for plan in plans])

    def states(self, places: Sequence[int], plan: Plan | None = None) -> Iterator[Mapping[int, NDArray[np.float32]]]:
        """See `Evidence`."""
        from lmprune.forward.states import states

        return states(self._lab.model, self._lab.texts.chosen_on, places, plan=plan)

    def weights(self) -> Iterator[tuple[int, str, NDArray[np.float32]]]:
        """See `Evidence`."""
        from lmprune.models.stack import find_stack

        for layer, module in enumerate(find_stack(self._lab.model).layers):
            for name, parameter in module.named_parameters():
                yield layer, name, parameter.detach().float().cpu().numpy()

    def gradients(self) -> Iterator[tuple[int, str, NDArray[np.float32], NDArray[np.float32]]]:
        """See `Evidence`."""
        from lmprune.forward.objectives import parse_objective
        from lmprune.forward.states import gradients

        terms = parse_objective(self.objective)
        if any(term.name == "kl" for term in terms):
            raise UsageError("--objective kl: the whole model does not diverge from itself, so it has no gradient")
        if any(term.name == "answers" for term in terms):
            raise UsageError("--objective answers: it counts, so it has no gradient. Use self")
        each = [gradients(self._lab.model, self._lab.measures.tokens(term, False)) for term in terms]
        for same in zip(*each):
            layer, name, value, _ = same[0]
            mixed = np.zeros_like(value)
            for term, found in zip(terms, same):
                mixed += np.float32(term.share) * found[3]
            yield layer, name, value, mixed


class _Texts(NamedTuple):
    chosen_on: Tokens
    judged_on: Tokens
    measured_on: int
    """Samples of a profile, of which the first are chosen on."""
    rest: Tokens
    """What repairs are fitted on."""


class _Lab:
    """The live model, its texts, and what was measured: each made when it is first asked for."""

    def __init__(
        self,
        cut: Cut,
        settings: ProfileSettings,
        data: DataSettings,
        journal_file: Path | None,
        how: ChoiceSettings,
        files: Path | None = None,
        *,
        judged: float = JUDGED,
    ) -> None:
        self.cut, self._settings, self._data, self._judged = cut, settings, data, judged
        self._journal_file, self._how, self.files = journal_file, how, files

    @cached_property
    def settings(self) -> ProfileSettings:
        """As they were given, with the type that the model runs in."""
        from lmprune.forward.machine import pick_device
        from lmprune.profiling.run import in_type_to_run

        return in_type_to_run(self._settings, self.cut, pick_device(self._settings.device))

    @property
    def measured(self) -> bool:
        """Whether there is anything."""
        return "measures" in self.__dict__

    @property
    def read(self) -> bool:
        """Whether text has been read."""
        return "texts" in self.__dict__

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return "model" in self.__dict__

    @property
    def measured_on(self) -> int:
        """Samples that a profile is made of; all of a text of which nothing can be left to judge on."""
        try:
            return self.texts.measured_on
        except DataError:
            return self._settings.samples

    def fresh(self) -> _Lab:
        """The same model and texts, with nothing measured."""
        _ = self.measures
        other = copy.copy(self)
        other.__dict__["measures"] = self.measures.fresh()
        return other

    def repaired(self, plan: Plan) -> _Lab:
        """The same of the repaired model that ``plan`` leaves, which is made where something is measured."""
        from lmprune.choosing.repairing import Repairer

        assert self._how.after is not None, "no repair was asked for"
        repairer = Repairer(self._how.after, self.cut, self.texts.rest)
        other = copy.copy(self)
        runs = cache(lambda: repairer.repaired(self.model, plan))
        other.__dict__["measures"] = self.measures.on(plan, runs, f"after {self._how.after}")
        return other

    def close(self, done: bool) -> None:
        """Close the journal, or remove it."""
        if "journal" in self.__dict__:
            self.journal.remove() if done else self.journal.close()

    @cached_property
    def processes(self) -> Processes:
        """Those that share the samples."""
        from lmprune.forward.processes import Processes

        return Processes.join(cpu=self._settings.device == "cpu")

    @cached_property
    def streams(self) -> bool:
        """Whether losses are measured layer by layer: as asked, or where the weights have no room."""
        how = self.settings
        if self.loaded or how.stream is not None:
            return bool(how.stream) and not self.loaded
        fit, told = _room(self.cut, how)
        if not fit:
            _say(f"{told}: reading one layer at a time (--stream)")
        return not fit

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model in memory.

        Raises:
            ModelError: it has no room there, or is not wanted there.
        """
        from lmprune.forward.machine import pick_device

        _require_own_code_stays(self.cut)
        how = self.settings
        if self.files is not None:
            return _in_files(self.cut, how.dtype, self.files)
        _require_room(self.cut, how)
        device = str(pick_device(how.device, self.processes.local_rank))
        place = {"device_map": how.device_map} if how.device_map else {"device": device}
        return self.cut.load(dtype=how.dtype, quantization=how.quantization, **place)

    @property
    def _measured(self) -> Any:
        """The model whose losses are measured: in memory, or read layer by layer."""
        if not self.streams:
            return self.model
        from lmprune.forward.machine import pick_device
        from lmprune.forward.streaming import StreamedModel

        _require_own_code_stays(self.cut)
        device = pick_device(self._settings.device, self.processes.local_rank)
        return StreamedModel(self.cut, dtype=self.settings.dtype, device=device)

    @cached_property
    def texts(self) -> _Texts:
        """What is chosen on, the first samples of those of a profile; and what is judged on, those after them all.

        Raises:
            DataError: there are too few.
        """
        from lmprune.profiling.run import calibration_tokens

        asked = self._settings.samples
        chosen = min(asked, self._how.loss_samples)
        judged = max(LEAST_JUDGED, int(self._judged * chosen))
        every = calibration_tokens(self.cut, replace(self._settings, samples=asked + judged), self._data)
        measured = asked if every.samples >= asked + judged else min(asked, every.samples * 2 // 3)
        if not measured:
            raise DataError(
                f"{every.source} holds {every.samples} samples: too few to choose on some and judge on others. Give "
                "more text, or --no-pack"
            )
        if measured < asked:
            left = every.samples - measured
            _say(f"{every.source} holds {every.samples} samples: {measured} to choose on, {left} to judge on")
        judged_on = every.part(measured, measured + judged)
        return _Texts(every.take(min(chosen, measured)), judged_on, measured, self._rest(every, measured, judged))

    def _rest(self, every: Tokens, measured: int, judged: int) -> Tokens:
        """Text to repair on: what comes after all other samples, or where the source ends there, what is chosen on."""
        from lmprune.profiling.run import calibration_tokens

        if self._how.after is None:
            return every
        from lmprune.choosing.repairing import known_repair, tokens_wanted

        more = -(-tokens_wanted(known_repair(self._how.after)) * every.samples // every.count)
        first = measured + judged
        longer = calibration_tokens(self.cut, replace(self._settings, samples=first + more), self._data)
        return longer.part(first) if longer.samples > first + more // 2 else every.take(measured)

    @cached_property
    def journal(self) -> Journal:
        from lmprune.forward.journal import Journal

        how = self.settings
        depends = {name: getattr(how, name) for name in ("seed", "batch_size", "device", "dtype", "quantization")}
        identity = {
            "model": self.cut.fingerprint,
            "text": [self.texts.chosen_on.hash, self.texts.judged_on.hash, self.texts.rest.hash],
            "data": asdict(self._data),
            "abreast": self._how.abreast,
            **depends,
        }
        main = self.processes.main
        made = Journal(self._journal_file if main else None, identity, resume=how.resume)
        for key, value in self.processes.from_main([(key, made.get(key)) for key in made]):
            if not main:
                made.put(key, value)
        if made.stale:
            _say(f"{self._journal_file} was left by another command: starting anew")
        elif len(made) and main:
            _say(f"going on from {self._journal_file}")
        return made

    @cached_property
    def measures(self) -> Measures:
        from lmprune.forward.measures import Measures

        def gold(task: str, samples: int) -> Tokens:
            from lmprune.evaluation.gold import gold_answers

            length, how = min(self._settings.max_length, self.cut.window or self._settings.max_length), self._settings
            return gold_answers(task, self.cut.tokenizer(), samples=samples, max_length=length, seed=how.seed)

        return Measures(
            self._measured, self.cut.tokenizer(), self.texts[:2], gold, seed=self._settings.seed,
            default=self.cut.default_data, journal=self.journal, batch_size=self._settings.batch_size,
            states=self._how.states, abreast=self._how.abreast, processes=self.processes,
        )  # fmt: skip


def _require_own_code_stays(cut: Cut) -> None:
    if cut.trust_remote_code:
        raise UsageError("profiling does not run a model's own code. Give --layers or --criterion deepest")


def _in_files(cut: Cut, dtype: str, folder: Path) -> PreTrainedModel:
    import torch

    from lmprune.forward.streaming import StreamedModel
    from lmprune.models.in_files import Files

    return StreamedModel(cut, dtype=dtype, device=torch.device("cpu")).in_files(Files(folder))


def _room(cut: Cut, how: ProfileSettings) -> tuple[bool, str]:
    """Whether the weights fit in memory, and how much they take."""
    from lmprune.forward.machine import fits, free_memory, pick_device, weights_bytes

    if how.quantization or how.device_map:
        return True, ""
    weights, device = weights_bytes(cut, cut.dtype(how.dtype).itemsize), pick_device(how.device)
    told = f"the weights take {sized(weights)} and {sized(free_memory(device))} are free on {device}"
    return fits(weights, device), told


def _require_room(cut: Cut, how: ProfileSettings) -> None:
    """Refuse to load a model that would not fit, or that is to be read layer by layer."""
    fit, told = _room(cut, how)
    if how.stream or not fit:
        told = "--stream reads one layer at a time" if how.stream else told
        raise ModelError(
            f"{told}: this criterion or objective needs the whole model in memory. Use --quantization nf4, "
            "--device-map auto, --objective loss or kl, or --criterion greedy"
        )
