"""The whole of healing in order: what, on which text, against which levels; learn; merge; prove; write."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lmprune.cuts.lineage import Lineage
from lmprune.cuts.plan import Plan, is_stock
from lmprune.cuts.recipe import Recipe
from lmprune.drawing.losses import draw_losses
from lmprune.errors import LmpruneError, ModelError, OutputError, UsageError, UselessRepair, VerifyError, line_of, sized
from lmprune.files import check_output_folder, locked, new_folder, read_json, write_json, write_text
from lmprune.forward.journal import changed
from lmprune.forward.loss import Losses, held_out_losses
from lmprune.forward.machine import free_memory, out_of_memory, release, weights_bytes
from lmprune.healing import training
from lmprune.healing.facts import Facts
from lmprune.healing.keeping import Kept
from lmprune.healing.learning import Learning, Learnt
from lmprune.healing.low_rank import write_low_rank
from lmprune.healing.machine import Machine, fsdp
from lmprune.healing.methods.base import Agreement, Method, Patching, Repairing, Teaching, Training
from lmprune.healing.methods.full import Full
from lmprune.healing.one_by_one import check_in_files, streamed_losses, streams, write_changed
from lmprune.healing.patching import check_unpatched, write_patched
from lmprune.healing.presets import resolve
from lmprune.healing.readers import is_turned
from lmprune.healing.reading import blocks_of
from lmprune.healing.rehearsal import check_apart, rehearse, rehearse_patch, rehearse_streamed, require_room
from lmprune.healing.settings import HealSettings, Resolved
from lmprune.healing.student import live_where_it_fits, trained_tensors
from lmprune.healing.writing import Merger, probe_ids, write_checkpoint
from lmprune.models.adapters import attach_adapter
from lmprune.models.carrying import require_stock
from lmprune.models.companions import check_companions
from lmprune.models.cut import Cut, open_cut
from lmprune.models.locate import ModelFolder
from lmprune.settings import seconds_of
from lmprune.text.blocks import Blocks
from lmprune.text.sources import DataSettings
from lmprune.versions import versions

LOGGER = logging.getLogger("lmprune")
CURVE = "healing.png"
LOGS = "runs"
"""Where TensorBoard's callback writes, within Trainer's folder and then within OUT."""
_EVAL_BATCH = 16


@dataclass(frozen=True)
class HealResult:
    """What healing reached. Losses are nats per token on the same held-out blocks; ``original`` may be unknown.

    ``steps`` and ``best_step`` are 0 where nothing trained. ``repaired`` is the loss after a repair that came before
    training, and ``repair_closed`` the share of the gap that it closed alone; None where none did. ``errors`` holds the
    standard errors, over blocks, of all of these by their names; None of one block.
    """

    path: Path
    method: str
    steps: int
    best_step: int
    original: float | None
    pruned: float
    healed: float
    gap_closed: float | None
    trained_parameters: int
    seconds: float
    merged_distance: float | None
    repaired: float | None = None
    repair_closed: float | None = None
    errors: Mapping[str, float | None] = field(default_factory=dict)

    @classmethod
    def read(cls, out: Path) -> HealResult:
        """The result that a healed folder records.

        Raises:
            ModelError: it records none.
        """
        told = Lineage.read(out)
        if told is None or told.healing is None:
            raise ModelError(f"{out} was not written by `lmprune heal`")
        healing = told.healing
        names = ("steps", "best_step", "gap_closed", "trained_parameters", "seconds", "merged_distance")
        first = healing.get("first") or {}
        errors, before = healing.get("errors", {}), first.get("errors", {})
        return cls(
            path=out,
            method=healing["settings"]["method"],
            **healing["losses"],
            **{n: healing[n] for n in names},
            repaired=first["losses"]["healed"] if first else None,
            repair_closed=first.get("gap_closed"),
            errors={
                **errors,
                **({"repaired": before.get("healed"), "repair_closed": before.get("gap_closed")} if first else {}),
            },
        )

    def to_data(self) -> dict[str, Any]:
        """Plain data for ``--json``: what was measured on blocks, with its standard error."""
        said = {name: value for name, value in asdict(self).items() if name not in ("path", "errors")}

        def measured(name: str) -> dict[str, float | None]:
            return {"value": said.pop(name), "error": self.errors.get(name)}

        names = ("original", "pruned", *(["repaired"] if self.repaired is not None else []), "healed")
        losses = {name: measured(name) for name in names}
        said.pop("repaired", None)
        shares = {name: measured(name) for name in ("gap_closed", "repair_closed")}
        return {"out": str(self.path), **said, "losses": losses, **shares}


def heal(
    model: str | Path | Recipe | Cut,
    out: str | Path,
    settings: HealSettings | None = None,
    data: DataSettings | None = None,
) -> HealResult:
    """Heal a cut into the new folder ``out``.

    Killed at any time, the same call goes on from its last checkpoint, kept in a hidden folder beside ``out``.

    Args:
        model: whatever `open_cut` opens: a recipe, whose base is cut in memory, or a pruned checkpoint.

    Raises:
        UsageError: settings that do not fit each other or the model.
        OutputError: ``out`` is not empty, or an unfinished run with other settings lies beside it.
        DataError: too little text, or held-out text among the training text.
        LmpruneError: the loss is no number, memory is short, or a closed form did not help.
        VerifyError: the merged checkpoint does not do what was trained.
    """
    settings, data, out = settings or HealSettings(), data or DataSettings(), Path(out)
    if data.pack is False:
        raise UsageError("--no-pack: healing trains on full blocks, so its text is always joined. Leave it out")
    check_output_folder(out)
    training.check_loggers(settings.report_to)
    cut = open_cut(model)
    check_companions(cut.base.path)
    empty, machine = cut.empty(), Machine.of(settings, str(cut.dtype()).removeprefix("torch."))
    resolved, notes = resolve(settings, Facts.of(cut), partial(_check_fits, cut, empty, machine.device))
    base, plan = _check(cut, settings, resolved)
    if isinstance(resolved.way, Training):
        training.micro_batch(resolved.way, settings.micro_batch_size, machine.state.num_processes)
    for part in resolved.parts:
        part.check_model(empty, plan)
    if machine.main:
        for note in (*_remarks(cut), *notes):
            LOGGER.info(note)
    repairs = any(isinstance(part, Repairing) and part.streams for part in resolved.parts)
    # Decided once: how much is free changes.
    streamed = repairs and base is not None and streams(cut, Cut(base), machine.device, settings.stream)
    try:
        if streamed and base is not None and plan is not None and is_turned(plan):
            check_in_files(cut, Cut(base), machine.device, out)
        if resolved.first is not None and not (_work(out) / "repaired").is_dir():
            require_room(cut, out, copies=2)
    except LmpruneError as exc:
        if resolved.alone is None:
            raise
        LOGGER.info(f"{resolved.alone.method} alone, since {exc}")
        resolved, streamed = resolved.alone, False
    learning = Learning(cut, base, plan, settings, resolved, machine, _work(out) / "checkpoints", streamed)
    return _Run(cut, base, out, settings, resolved, data, machine, learning).go()


def _check_fits(cut: Cut, empty: nn.Module, device: str, part: Method | Teaching) -> None:
    """Refuse a part of a method that a preset would choose, where the model or the memory does not allow it.

    Raises:
        UsageError, ModelError: it does not.
    """
    part.check_model(empty, cut.origin.plan)
    taught = isinstance(part, Teaching)  # unasked, none but what trains all weights is
    if not taught and not isinstance(part, Full):
        return
    base = cut.origin.base
    wanted = weights_bytes(cut, 16) + (weights_bytes(Cut(base), 4) if taught and base is not None else 0)
    if wanted > (free := free_memory(device)):
        what = "gradients, AdamW's means and the unpruned model" if taught else "gradients and AdamW's means"
        raise ModelError(f"all weights, {what} take {sized(wanted)}, and {sized(free)} are free")


def _work(out: Path) -> Path:
    """Checkpoints and everything else that a killed run needs to go on."""
    return out.resolve().with_name(f".{out.resolve().name}.healing")


def _check(cut: Cut, settings: HealSettings, resolved: Resolved) -> tuple[ModelFolder | None, Plan | None]:
    """The unpruned model where it is needed, and what is missing from it, once all that could not work is refused."""
    if settings.keep_adapter and (resolved.first is not None or not resolved.way.adapter):
        raise UsageError(
            f"--keep-adapter: --method {resolved.method} changes the weights themselves and makes no adapter"
        )
    if isinstance(resolved.way, Patching):
        check_unpatched(cut, resolved.method)
    elif not (settings.keep_adapter and resolved.way.adapter):
        require_stock(cut.origin.plan, cut.name)
    for what in cut.origin.plan.parts if resolved.lesson is not None and cut.origin.plan is not None else ():
        if not is_stock(what):
            raise UsageError(
                f"--method {resolved.method}: a teacher runs the student's own layers, which {what.describe()} "
                "changes. Train with what has no teacher, such as lora"
            )
    if settings.as_adapter is not None and isinstance(resolved.way, Patching):
        raise UsageError(f"--as-adapter: --method {resolved.method} makes a patch, which no LoRA holds. Leave it out")
    if settings.as_adapter is not None and not isinstance(resolved.way, Repairing):
        raise UsageError(f"--as-adapter: --method {resolved.method} trains. Give --keep-adapter with --method lora")
    if settings.as_adapter is not None and settings.as_adapter < 1:
        raise UsageError(f"--as-adapter {settings.as_adapter}: give a rank from 1")
    base = None
    few_bits = getattr(cut.whole_config.get_text_config(), "quantization_config", None) is not None
    if few_bits and any(isinstance(part, Repairing) for part in resolved.parts):
        raise UsageError(
            f"--method {resolved.method} changes weights, and those of {cut.name} are stored in few bits. "
            "Repair the unquantised model, then quantise it"
        )
    for part in resolved.parts:
        if part.needs_base:
            base = _require_base(cut, resolved.method)
        if part.one_process and fsdp():
            raise UsageError(
                f"{resolved.method}: {part.one_process}, which FSDP cannot follow. Launch without --use_fsdp"
            )
    if settings.stream:
        if not any(isinstance(part, Repairing) and part.streams for part in resolved.parts):
            raise UsageError(f"--stream: --method {resolved.method} needs the whole model. Use refit or replaceme")
        if settings.as_adapter is not None:
            raise UsageError("--stream writes a checkpoint. Leave --as-adapter out")
    if settings.self_data:
        base = _require_base(cut, "--self-data")
    if settings.keep_adapter and (cut.lineage.healed or cut.adapter is not None):
        raise UsageError(f"--keep-adapter: {cut.name} was healed before, so its adapter would fit no recipe")
    if settings.budget is not None:
        seconds_of(settings.budget)
        if not isinstance(resolved.way, Training):
            raise UsageError(f"--budget: --method {resolved.method} trains no steps. Leave it out")
        if (steps := getattr(settings, "steps", None)) is not None:
            raise UsageError(f"--budget {settings.budget} and --steps {steps}: give one of them")
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UsageError("--budget is planned in one process. Give --steps to several")
    if settings.document_mask and any(isinstance(part, Repairing) for part in resolved.parts):
        raise UsageError(f"--document-mask: --method {resolved.method} solves on blocks as they are. Leave it out")
    if settings.patience is not None and settings.patience < 1:
        raise UsageError(f"--patience {settings.patience}: give a number above 0")
    return base, cut.origin.plan


def _require_base(cut: Cut, why: str) -> ModelFolder:
    """The unpruned model.

    Raises:
        UsageError: it is not known, or the cut's weights are no longer its own.
    """
    origin = cut.origin
    if origin.base is None or origin.plan is None:
        raise UsageError(f"{why} needs the unpruned model: {origin.problem}. Heal from the recipe")
    if cut.lineage.healed or cut.adapter is not None:
        raise UsageError(f"{why} needs the base's own weights, but {cut.name} was healed before. Heal from the recipe")
    return origin.base


def _remarks(cut: Cut) -> list[str]:
    """What the user should be told of the model."""
    origin = cut.origin
    if origin.plan is None:
        return [f"{origin.problem}, so healing it is plain fine-tuning"]
    return [origin.problem] if origin.problem else []


@dataclass(frozen=True)
class _Run:
    """One call of `heal`; its methods are its steps."""

    cut: Cut
    base: ModelFolder | None
    out: Path
    settings: HealSettings
    resolved: Resolved
    data: DataSettings
    machine: Machine
    learning: Learning

    def go(self) -> HealResult:
        with locked(_work(self.out)) if self.machine.main else nullcontext():
            try:
                return self._healed()
            except LmpruneError as exc:
                if self.machine.main:
                    self._tidy(exc)
                raise

    def _tidy(self, why: LmpruneError) -> None:
        """Leave no folder of a run that came to nothing: neither what does not help."""
        work = _work(self.out)
        solved = not isinstance(why, UselessRepair) and any(work.glob("*-solved/layer-*.json"))
        made = (work / "repaired").is_dir() or solved
        if not training.complete_checkpoints(work / "checkpoints") and not made:
            shutil.rmtree(work, ignore_errors=True)

    def _healed(self) -> HealResult:
        began = time.monotonic()
        with self.machine.state.main_process_first():
            if self.machine.main:
                self._claim()
                self._rehearse()
            run = self._within_budget(began)
            blocks = blocks_of(
                self.cut,
                self.base if self.settings.self_data else None,
                self.settings,
                run.resolved,
                self.data,
                _work(self.out) / "blocks.npz",
                device=self.machine.device,
                dtype=self.machine.dtype,
            )
            levels = run._levels(blocks)
            after = run if self.resolved.first is None else run._after_repair(self.resolved.first, blocks, levels)
        learnt = after.learning.learn(blocks, levels)
        if self.machine.main:
            write = after._write if learnt.maps is None else after._write_patch
            with self._kept_if_unwritable():
                write(learnt, blocks, levels, began)
            shutil.rmtree(_work(self.out))
        self.machine.state.wait_for_everyone()
        return HealResult.read(self.out)

    def _rehearse(self) -> None:
        """Before any text is read, where nothing was trained yet."""
        work = _work(self.out)
        if training.complete_checkpoints(work / "checkpoints"):
            return
        if self.settings.document_mask:
            check_apart(self.cut, self.machine.device)
        way, seed = self.resolved.way, self.resolved.seed
        alone = self.settings.keep_adapter or self.settings.as_adapter is not None or isinstance(way, Patching)
        require_room(self.cut, self.out, copies=0 if alone else 1)
        if isinstance(way, Patching):
            assert self.learning.plan is not None, "the base is needed, so it is known"
            rehearse_patch(self.cut, self.learning.plan, self.resolved.method, way, work)
        elif self.learning.stream:
            rehearse_streamed(self.cut, way, work, device=self.machine.device)
        else:
            rehearse(self.cut, way, seed, work, device=self.machine.device, compute=self._compute)

    @property
    def _compute(self) -> str:
        """The type in which what was learnt is merged."""
        return "float32" if isinstance(self.resolved.way, Repairing) else self.machine.dtype

    def _within_budget(self, began: float) -> _Run:
        """This run with as many steps as there is time for, where there is a limit."""
        if self.settings.budget is None:
            return self
        learning = replace(self.learning, deadline=began + seconds_of(self.settings.budget))
        resolved = replace(self.resolved, way=learning.in_time())
        return replace(self, resolved=resolved, learning=replace(learning, resolved=resolved))

    def _identity(self) -> dict[str, Any]:
        """All that the trained weights depend on; a run goes on only from checkpoints of the same."""
        return {
            "source": self.cut.fingerprint,
            "settings": self.resolved.to_data(),
            "asked": self.resolved.asked,
            "as_adapter": self.settings.as_adapter,
            "stream": self.settings.stream,
            "data": asdict(self.data)
            | {"eval_data": self.settings.eval_data, "self_data": self.settings.self_data}
            | {"document_mask": self.settings.document_mask},
            "micro_batch_size": self.settings.micro_batch_size,
            "budget": self.settings.budget,
            "processes": self.machine.state.num_processes,
            "device": self.machine.device.partition(":")[0],
            "dtype": self.machine.dtype,
            "versions": versions(),
        }

    def _claim(self) -> None:
        """Make the work folder, or find that it is ours to go on with."""
        work = _work(self.out)
        mine, path = self._identity(), work / "run.json"
        if not self.settings.resume and work.exists():
            shutil.rmtree(work)
        theirs = read_json(path, OutputError, f"Remove {work}") if path.is_file() else {}
        other = changed(mine, theirs)
        kept = training.complete_checkpoints(work / "checkpoints")
        if other and not kept:
            # No step of theirs would be lost, and what was repaired does not depend on how many blocks train at once.
            if other == ["micro_batch_size"]:
                (work / "course.json").unlink(missing_ok=True)
            else:
                shutil.rmtree(work, ignore_errors=True)
            write_json(path, mine)
            return
        if other:
            raise OutputError(
                f"{work} holds an unfinished run for this OUT with other {' and '.join(other)}. "
                "Run the same command to finish it, or add --no-resume to throw it away"
            )
        if kept:
            LOGGER.info("going on after step %s, from %s", kept[-1].name.rpartition("-")[2], work)

    def _after_repair(self, method: Repairing, blocks: Blocks, levels: training.Levels) -> _Run:
        """The run that trains the cut model once ``method`` has repaired it: kept as a checkpoint in the work folder.

        What nobody asked for may fail: then the cut model trains as it is.

        Raises:
            UselessRepair: it does not help, and was asked for.
        """
        folder, without = _work(self.out) / "repaired", _work(self.out) / "unrepaired"
        why, short = without.read_text(encoding="utf-8") if without.is_file() else "", False
        if not folder.is_dir() and not why:
            self.learning.require_block()
            try:
                self._repair(method, blocks, levels)
            except (LmpruneError, MemoryError, RuntimeError) as exc:
                short = out_of_memory(exc)
                failed = isinstance(exc, LmpruneError) and not isinstance(exc, (OutputError, VerifyError))
                if self.resolved.alone is None or not (failed or short):
                    raise
                why = line_of(exc)
        if why:
            release()  # out here: the exception, which held the models, is gone
            if not short:  # which may be otherwise another time
                write_text(without, why)
            alone = self.resolved.alone
            assert alone is not None, "it was not asked for"
            LOGGER.info(f"{alone.method} alone, since {why}")
            return replace(self, resolved=alone, learning=replace(self.learning, resolved=alone))
        repaired = replace(self.cut, base=replace(self.cut.base, path=folder), plan=None, recipe=None, adapter=None)
        return replace(self, cut=repaired, learning=replace(self.learning, cut=repaired))

    def _repair(self, method: Repairing, blocks: Blocks, levels: training.Levels) -> None:
        """Write what ``method`` makes of the cut model to the work folder."""
        folder, name = _work(self.out) / "repaired", self.resolved.method.partition("+")[0]
        settled = replace(self.resolved, method=name, way=method, lesson=None, first=None)
        run = replace(self, out=folder, resolved=settled, learning=replace(self.learning, resolved=settled))
        began, fitted = time.monotonic(), replace(blocks, train=blocks.train[: method.blocks])
        run._write(run.learning.learn(fitted, levels), fitted, levels, began)
        done = HealResult.read(folder)
        share = "" if done.gap_closed is None else f", {done.gap_closed:.1%} of the gap"
        LOGGER.info(f"{name}: held-out loss {done.pruned:.4f} -> {done.healed:.4f}{share}; now it trains")

    # --- measuring ----------------------------------------------------------------------------------------------

    def _levels(self, blocks: Blocks) -> training.Levels:
        """Held-out losses of the pruned and the original model, both unquantised."""
        path = _work(self.out) / "levels.json"
        if not path.is_file():
            base = self.cut.origin.base
            found = [self._loss_of(self.cut, blocks), *([self._loss_of(Cut(base), blocks)] if base else [])]
            write_json(path, {"values": [one.values[0].tolist() for one in found], "tokens": found[0].tokens.tolist()})
        told = json.loads(path.read_text(encoding="utf-8"))
        pruned, *original = (Losses(np.array([each]), np.array(told["tokens"])) for each in told["values"])
        return training.Levels(pruned, original[0] if original else None)

    def _loss_of(self, cut: Cut, blocks: Blocks, adapter: Path | None = None) -> Losses:
        if self.learning.stream:
            device = self.machine.device
            return streamed_losses(cut, blocks.held_out, device, batch=_EVAL_BATCH, unscored=blocks.unscored)
        model = live_where_it_fits(cut, dtype=self.machine.dtype, device=self.machine.device)
        if adapter is not None:
            model = attach_adapter(model, str(adapter), cut.base.path, cut.plan)
        loss = held_out_losses(
            model, blocks.held_out, batch=_EVAL_BATCH, unscored=blocks.unscored, places=blocks.places
        )
        del model
        release()
        return loss

    # --- writing ------------------------------------------------------------------------------------------------

    def _write(self, learnt: Learnt, blocks: Blocks, levels: training.Levels, began: float) -> None:
        if self.learning.stream:
            self._write_streamed(learnt, blocks, levels, began)
            return
        student: nn.Module | None = learnt.hand_over()
        ids = probe_ids(blocks.held_out, self.cut.whole_config.get_text_config().vocab_size)
        work = _work(self.out)
        count = 0  # of a closed form: what trains are none of its parameters
        if isinstance(self.resolved.way, Training):
            count = sum(p.numel() for p in trained_tensors(student).values())
        merging = Merger(
            self.cut,
            self.resolved.way,
            self.resolved.seed,
            ids,
            work / "adapter",
            self._compute,
            self.machine.device,
        )
        kept = None
        if self.settings.as_adapter is not None:
            untouched = live_where_it_fits(self.cut, dtype="float32", device=self.machine.device)
            kept = write_low_rank(student, untouched, self.settings.as_adapter, work / "adapter")
            LOGGER.info(f"rank {self.settings.as_adapter} keeps {kept:.1%} of the change")
            del untouched
            student = None
            release()
        elif self.resolved.way.adapter:
            merging.keep(student)
            student = None
            release()
        with new_folder(self.out) as folder:
            if self.settings.keep_adapter or self.settings.as_adapter is not None:
                shutil.copytree(work / "adapter", folder, dirs_exist_ok=True)
                (folder / "README.md").unlink(missing_ok=True)
                agreement, loss = None, self._loss_of(self.cut, blocks, work / "adapter")
            else:
                model, agreement = self.resolved.way.merge(student, merging)
                student = None
                agreement.require(self._what_is_left())
                write_checkpoint(model, self.cut.base.path, ids, folder)
                del model
                release()
                loss = self._loss_of(Cut(replace(self.cut.base, path=folder)), blocks)
            self._require_help(loss, levels)
            if (logs := work / "checkpoints" / LOGS).is_dir():
                shutil.copytree(logs, folder / LOGS)
            if learnt.held_out:
                text = learnt.training if self.resolved.lesson is None else []  # a teacher's loss is another
                draw_losses(folder / CURVE, text, learnt.held_out, levels.pruned, levels.original)
            self._note(folder, learnt, blocks, levels, loss, count, agreement, kept, began)

    @contextmanager
    def _kept_if_unwritable(self) -> Iterator[None]:
        """Within the block, what cannot be written costs no training.

        Raises:
            OutputError: it cannot.
        """
        try:
            yield
        except OutputError as exc:
            if not isinstance(self.resolved.way, Training):
                raise
            raise OutputError(
                f"{exc}. What was trained is kept in {_work(self.out)}: the same command writes it, without training "
                "again"
            ) from exc

    def _write_patch(self, learnt: Learnt, blocks: Blocks, levels: training.Levels, began: float) -> None:
        """A recipe with the patch beside it."""
        assert learnt.maps is not None and self.learning.plan is not None
        learnt.student = None
        release()
        with new_folder(self.out) as folder:
            patched = write_patched(self.cut, self.learning.plan, self.resolved.method, learnt.maps, folder)
            loss = self._loss_of(patched, blocks)
            self._require_help(loss, levels)
            replace(self, cut=patched)._note(folder, learnt, blocks, levels, loss, 0, None, None, began)

    def _write_streamed(self, learnt: Learnt, blocks: Blocks, levels: training.Levels, began: float) -> None:
        """What was solved layer by layer, as a checkpoint, tensor by tensor."""
        with new_folder(self.out) as folder:
            write_changed(self.cut, Kept(self.learning.solved), folder)
            loss = self._loss_of(Cut(replace(self.cut.base, path=folder)), blocks)
            self._require_help(loss, levels)
            self._note(folder, learnt, blocks, levels, loss, 0, None, None, began)

    def _what_is_left(self) -> str:
        """Training is not lost with a proof that fails."""
        if self.resolved.way.adapter and self.resolved.first is None:
            return "the adapter is kept: the same command with --keep-adapter writes it, without training again"
        return f"the trained weights are kept in {_work(self.out)}. Please report it"

    def _require_help(self, found: Losses, levels: training.Levels) -> None:
        """Refuse to write a closed form that made nothing better: nothing of value is lost with it."""
        loss = float(found.mean()[0])
        if isinstance(self.resolved.way, Repairing) and not loss < levels.pruned:
            raise UselessRepair(
                f"--method {self.resolved.method} does not help this cut: held-out loss {levels.pruned:.4f} before, "
                f"{loss:.4f} after. Nothing was written"
            )

    def _note(
        self,
        folder: Path,
        learnt: Learnt,
        blocks: Blocks,
        levels: training.Levels,
        found: Losses,
        count: int,
        agreement: Agreement | None,
        kept: float | None,
        began: float,
    ) -> None:
        way, course, loss = learnt.way or self.resolved.way, learnt.course, float(found.mean()[0])
        healing = {
            "settings": replace(self.resolved, way=way).to_data(),
            "budget": self.settings.budget,
            "micro_batch": course.micro_batch if course else None,
            "pace": asdict(course.pace) if course and course.pace else None,
            "data": {
                "source": blocks.source,
                "self_data": self.settings.self_data,
                "document_mask": self.settings.document_mask,
                "hash": blocks.hash,
                "train_blocks": len(blocks.train),
                "held_out_blocks": len(blocks.held_out),
            },
            "losses": {"original": levels.original, "pruned": levels.pruned, "healed": loss},
            "gap_closed": levels.closed(loss),
            "errors": {
                "original": _error(levels.of_original),
                "pruned": _error(levels.of_pruned),
                "healed": _error(found),
                "gap_closed": _known(levels.closed_error(found)),
            },
            "repair": learnt.repair,
            "adapter": None if kept is None else {"rank": self.settings.as_adapter, "kept": kept},
            "first": self.cut.lineage.healing if self.resolved.first is not None else None,
            "steps": learnt.steps,
            "best_step": learnt.best_step,
            "held_out": learnt.held_out,
            "trained_parameters": count,
            "merged_distance": agreement.relative_distance if agreement else None,
            "tolerance": agreement.tolerance if agreement else None,
            "rounding_distance": agreement.rounding if agreement else None,
            "device": self.machine.device,
            "dtype": self.machine.dtype,
            "processes": self.machine.state.num_processes,
            "seconds": round(time.monotonic() - began, 1),
        }
        told = replace(self.cut.lineage, stage="heal", healing=healing, versions=versions())
        replace(told, writer=None, writer_reason=None, proof=None).write(folder)


def _error(losses: Losses | None) -> float | None:
    """The standard error of a loss; None of one block, which has none."""
    return None if losses is None else _known(float(losses.own_errors()[0]))


def _known(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
