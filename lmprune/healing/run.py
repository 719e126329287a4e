"""The whole of healing in order: what, on which text, against which levels; train; merge; prove; write."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainerState

from lmprune.cuts.lineage import LINEAGE
from lmprune.drawing.losses import draw_losses
from lmprune.errors import LmpruneError, OutputError, UsageError
from lmprune.files import check_output_folder, new_folder, write_json
from lmprune.forward.loss import held_out_loss
from lmprune.forward.machine import out_of_memory, release
from lmprune.healing import training, writing
from lmprune.healing.memory import advice, load_where_it_fits
from lmprune.healing.methods import check_method, prepare, trained_tensors
from lmprune.healing.presets import resolve
from lmprune.healing.self_data import Writer
from lmprune.healing.settings import HealSettings, Resolved
from lmprune.healing.sources import Source
from lmprune.healing.teacher import Teacher
from lmprune.models.cut import open_cut
from lmprune.models.loading import load_model, load_tokenizer
from lmprune.text.blocks import Blocks, HeldOut, read_blocks, read_held_out, training_split
from lmprune.text.sources import DataSettings
from lmprune.versions import versions

CURVE = "healing.png"
LOGS = "runs"
"""Where TensorBoard's callback writes, within Trainer's folder and then within OUT."""
_EVAL_BATCH = 16


@dataclass(frozen=True)
class HealResult:
    """What healing reached. Losses are nats per token on the same held-out blocks; ``original`` may be unknown."""

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

    @classmethod
    def read(cls, out: Path) -> HealResult:
        """The result that a healed folder records."""
        healing = json.loads((out / LINEAGE).read_text(encoding="utf-8"))["healing"]
        names = ("steps", "best_step", "gap_closed", "trained_parameters", "seconds", "merged_distance")
        return cls(
            path=out, method=healing["settings"]["method"], **healing["losses"], **{n: healing[n] for n in names}
        )


@dataclass(frozen=True)
class Machine:
    """Where and in which type the work is done."""

    device: str
    dtype: str
    state: PartialState

    @property
    def cpu(self) -> bool:
        """Whether there is no accelerator in use."""
        return self.device == "cpu"

    @property
    def bf16(self) -> bool:
        """Whether matrix products run in bfloat16 under autocast."""
        return self.dtype == "bfloat16"

    @classmethod
    def of(cls, settings: HealSettings) -> Machine:
        """The device that was asked for, else the GPU, else the CPU."""
        device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device not in ("cpu", "cuda"):
            raise UsageError(f"--device {device!r}: choose cpu or cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: torch sees no GPU here. Use --device cpu")
        if fsdp() and os.environ.get("FSDP_VERSION") != "2":
            raise UsageError("FSDP 1 flattens frozen and trained weights together. Launch with --fsdp_version 2")
        dtype = settings.dtype or ("float32" if device == "cpu" else "bfloat16")
        if dtype not in ("bfloat16", "float32"):
            raise UsageError(f"--dtype {dtype!r}: choose bfloat16 or float32")
        # The others wait while the main process measures, merges and proves, which may take longer than torch allows.
        state = PartialState(cpu=device == "cpu", timeout=timedelta(days=1))
        return cls(str(state.device), dtype, state)


def fsdp() -> bool:
    """Whether `accelerate launch` was asked to spread the weights over processes."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def heal(
    model: str | Path | None,
    out: Path,
    settings: HealSettings | None = None,
    data: DataSettings | None = None,
    *,
    recipe: Path | str | None = None,
) -> HealResult:
    """Heal the pruned checkpoint ``model``, or the base of ``recipe`` cut in memory, into the new folder ``out``.

    Killed at any time, the same call goes on from its last checkpoint, kept in a hidden folder beside ``out``.

    Raises:
        UsageError: settings that do not fit each other or the model.
        OutputError: ``out`` is not empty, or an unfinished run with other settings lies beside it.
        DataError: too little text, or held-out text among the training text.
        LmpruneError: the loss is no number, or memory is short.
        VerifyError: the merged checkpoint does not do what was trained.
    """
    settings, data = settings or HealSettings(), data or DataSettings()
    check_output_folder(out)
    training.check_loggers(settings.report_to)
    if (model is None) == (recipe is None):
        raise UsageError("give either a pruned model or --recipe, and one of them")
    source = Source(open_cut(recipe if recipe is not None else str(model)))
    resolved, notes = resolve(settings, source.facts())
    if settings.keep_adapter and not resolved.adapter:
        raise UsageError(
            f"--keep-adapter: --method {resolved.method} trains the weights themselves and makes no adapter"
        )
    if resolved.distill:
        source.require_base("distill")
        if fsdp():
            raise UsageError("distill swaps layers in and out, which FSDP cannot follow. Launch without --use_fsdp")
    if settings.keep_adapter and source.lineage.healed:
        raise UsageError(f"--keep-adapter: {source.folder} was healed before, so its adapter would fit no recipe")
    if settings.patience is not None and settings.patience < 1:
        raise UsageError(f"--patience {settings.patience}: give a number above 0")
    machine = Machine.of(settings)
    training.micro_batch(resolved, settings.micro_batch, machine.state.num_processes)
    check_method(source.skeleton(), resolved, source.cut)
    for note in (*source.notes, *notes):
        _say(machine, note)
    run = _Run(source, out, settings, resolved, data, machine)
    return run.go()


def _say(machine: Machine, text: str) -> None:
    if machine.state.is_main_process:
        print(text, file=sys.stderr, flush=True)


@dataclass
class _Run:
    """One call of `heal`; its methods are its steps."""

    source: Source
    out: Path
    settings: HealSettings
    resolved: Resolved
    data: DataSettings
    machine: Machine

    @property
    def work(self) -> Path:
        """Checkpoints and everything else that a killed run needs to go on."""
        return self.out.resolve().with_name(f".{self.out.resolve().name}.healing")

    def go(self) -> HealResult:
        began = time.monotonic()
        with self.machine.state.main_process_first():
            if self.machine.state.is_main_process:
                self._claim()
            blocks = self._blocks()
            levels = self._levels(blocks)
        trained, state = self._train(blocks, levels)
        if self.machine.state.is_main_process:
            self._write(trained, state, blocks, levels, began)
            shutil.rmtree(self.work)
        self.machine.state.wait_for_everyone()
        return HealResult.read(self.out)

    def _identity(self) -> dict[str, Any]:
        """All that the trained weights depend on; a run goes on only from checkpoints of the same."""
        return {
            "source": self.source.fingerprint,
            "settings": self.resolved.to_data(),
            "data": asdict(self.data) | {"eval_data": self.settings.eval_data, "self_data": self.settings.self_data},
            "micro_batch": self.settings.micro_batch,
            "processes": self.machine.state.num_processes,
            "device": self.machine.device.partition(":")[0],
            "dtype": self.machine.dtype,
            "versions": versions(),
        }

    def _claim(self) -> None:
        """Make the work folder, or find that it is ours to go on with."""
        mine, path = self._identity(), self.work / "run.json"
        if self.settings.restart and self.work.exists():
            shutil.rmtree(self.work)
        theirs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        changed = sorted(key for key in mine if mine[key] != theirs.get(key))
        kept = training.complete_checkpoints(self.work / "checkpoints")
        if changed and not kept:
            # No step of theirs would be lost.
            shutil.rmtree(self.work, ignore_errors=True)
            write_json(path, mine)
            return
        if changed:
            raise OutputError(
                f"{self.work} holds an unfinished run for this OUT with other {' and '.join(changed)}. "
                "Run the same command to finish it, or add --restart to throw it away"
            )
        if kept:
            _say(self.machine, f"going on after step {kept[-1].name.rpartition('-')[2]}, from {self.work}")

    def _blocks(self) -> Blocks:
        path = self.work / "blocks.npz"
        if path.is_file():
            return Blocks.load(path)
        tokenizer, default = load_tokenizer(self.source.folder), self.source.default_data
        data = training_split(self.data, default)
        wanted, length = self.resolved.steps * self.resolved.batch, self.resolved.max_length
        held_out = read_held_out(
            data,
            tokenizer,
            blocks=self.resolved.eval_blocks,
            length=length,
            default=default,
            eval_data=self.settings.eval_data,
        )
        if self.settings.self_data:
            # What is measured stays real text; only what trains is the model's own.
            data = self._self_data(data, held_out, wanted)
        blocks = read_blocks(
            data,
            tokenizer,
            held_out,
            train=wanted,
            length=length,
            seed=self.resolved.seed,
            default=default,
            written=self.settings.self_data,
        )
        half = path.with_suffix(".half")
        blocks.save(half)
        half.replace(path)
        if len(blocks.train) < wanted:
            _say(
                self.machine,
                f"{blocks.source} fills {len(blocks.train)} blocks, each read {wanted / len(blocks.train):.1f} times",
            )
        return blocks

    def _self_data(self, data: DataSettings, held_out: HeldOut, blocks: int) -> DataSettings:
        base, _ = self.source.require_base("--self-data")
        return Writer(
            base.path,
            data,
            held_out,
            blocks=blocks,
            length=self.resolved.max_length,
            seed=self.resolved.seed,
            default=self.source.default_data,
            device=self.machine.device,
            dtype=self.machine.dtype,
        ).write()

    def _levels(self, blocks: Blocks) -> training.Levels:
        """Held-out losses of the pruned and the original model, both unquantised."""
        path = self.work / "levels.json"
        if not path.is_file():
            pruned = self._loss_of(self.source.folder, blocks, self.source.plan)
            original = None
            if self.source.base is not None:
                original = self._loss_of(self.source.base.path, blocks)
            write_json(path, {"pruned": pruned, "original": original})
        return training.Levels(**json.loads(path.read_text(encoding="utf-8")))

    def _loss_of(self, folder: Path, blocks: Blocks, plan: Any = None) -> float:
        model = load_where_it_fits(folder, plan, dtype=self.machine.dtype, device=self.machine.device)
        loss = held_out_loss(model, blocks.held_out, batch=_EVAL_BATCH)
        del model
        release()
        return loss

    def _model(self) -> tuple[nn.Module, Teacher | None]:
        """The student, ready to train, and its teacher."""
        # FSDP takes its share of a layer to the device itself; the whole may not fit there.
        how: dict[str, Any] = {"dtype": self.machine.dtype, "device": "cpu" if fsdp() else self.machine.device}
        how["quantization"] = self.resolved.quantization
        teacher = None
        if self.resolved.distill:
            base, cut = self.source.require_base("distill")
            model = load_model(base.path, **how)
            teacher = Teacher.take_apart(model, cut, self.resolved)
        else:
            model = load_model(self.source.folder, plan=self.source.plan, **how)
        model.config.use_cache = False
        student, notes = prepare(model, self.resolved, self.source.cut)
        for note in notes:
            _say(self.machine, note)
        if teacher is not None:
            teacher.freeze_twins(student)
        return student, teacher

    def _train(self, blocks: Blocks, levels: training.Levels) -> tuple[nn.Module | None, Any]:
        """The trained student with its best weights, and Trainer's state."""
        student, teacher = self._model()
        folder = self.work / "checkpoints"
        kept = training.complete_checkpoints(folder)
        micro, accumulate = training.micro_batch(
            self.resolved, self.settings.micro_batch, self.machine.state.num_processes
        )
        count = sum(p.numel() for p in trained_tensors(student).values())
        _say(self.machine, f"{self.resolved.method}: {count:,} parameters train, on {blocks.source}")
        callbacks: list[Any] = [training.Progress(levels), training.LastStep()]
        if self.settings.patience:
            callbacks.append(training.Patience(self.settings.patience))
        trainer = training.HealTrainer(
            teacher=teacher,
            model=student,
            args=training.arguments(
                self.resolved,
                folder,
                micro=micro,
                accumulate=accumulate,
                cpu=self.machine.cpu,
                bf16=self.machine.bf16,
                gradient_checkpointing=self.settings.gradient_checkpointing,
                report_to=self.settings.report_to,
                first_run=not kept,
            ),
            train_dataset=training.BlockData(
                blocks.train, self.resolved.steps * self.resolved.batch, seed=self.resolved.seed
            ),
            eval_dataset=training.BlockData(blocks.held_out),
            callbacks=callbacks,
        )
        if self.settings.patience and kept:
            reached = TrainerState.load_from_json(str(kept[-1] / training.STATE))
            if training.Patience(self.settings.patience).is_over(reached):  # killed after its end
                training.load_trained(student, Path(str(reached.best_model_checkpoint)))
                return student, reached
        ran_out = False
        try:
            trainer.train(resume_from_checkpoint=str(kept[-1]) if kept else None)
        except RuntimeError as exc:
            if not out_of_memory(exc):
                raise
            ran_out = True
        if ran_out:  # and the exception, which held on to the activations, is gone
            raise LmpruneError(
                advice(trainer, self.resolved, micro, checkpointing=self.settings.gradient_checkpointing)
            )
        if not fsdp():
            return student, trainer.state
        state = trainer.state
        del trainer, student
        release()
        return self._unspread(Path(state.best_model_checkpoint)), state

    def _unspread(self, best: Path) -> nn.Module | None:
        """After FSDP: the trained student whole again, in the process that writes."""
        if not self.machine.state.is_main_process:
            return None
        student, _ = self._model()
        training.load_trained(student, best)
        return student

    def _write(self, trained: Any, state: Any, blocks: Blocks, levels: training.Levels, began: float) -> None:
        ids = torch.from_numpy(blocks.held_out[: writing.PROBE].astype("int64"))
        count = sum(p.numel() for p in trained_tensors(trained).values())
        adapter = self.work / "adapter"
        if self.resolved.adapter:
            # Looking up the embeddings of the base would need the Hub; they do not train.
            trained.save_pretrained(adapter, save_embedding_layers=False)
            del trained
            release()
        how = {"dtype": self.source.dtype or "auto", "compute": self.machine.dtype, "device": self.machine.device}
        with new_folder(self.out) as folder:
            agreement = None
            if self.settings.keep_adapter:
                shutil.copytree(adapter, folder, dirs_exist_ok=True)
                (folder / "README.md").unlink(missing_ok=True)
                loss = self._loss_with(adapter, blocks)
            else:
                if self.resolved.adapter:
                    model, agreement = writing.merge_adapter(self.source, adapter, ids, **how)
                else:
                    model, agreement = writing.merge_weights(self.source, trained, self.resolved, ids, **how)
                agreement.require()
                writing.write_checkpoint(model, self.source, ids, folder)
                del model
                release()
                loss = self._loss_of(folder, blocks)
            held_out, history = training.eval_losses(state.log_history), training.train_losses(state.log_history)
            if (logs := self.work / "checkpoints" / LOGS).is_dir():
                shutil.copytree(logs, folder / LOGS)
            draw_losses(folder / CURVE, history, held_out, levels.pruned, levels.original)
            healing = {
                "settings": self.resolved.to_data(),
                "data": {
                    "source": blocks.source,
                    "self_data": self.settings.self_data,
                    "hash": blocks.hash,
                    "train_blocks": len(blocks.train),
                    "held_out_blocks": len(blocks.held_out),
                },
                "losses": {"original": levels.original, "pruned": levels.pruned, "healed": loss},
                "gap_closed": levels.closed(loss),
                "steps": state.global_step,
                "best_step": state.best_global_step,
                "held_out": held_out,
                "trained_parameters": count,
                "merged_distance": agreement.relative_distance if agreement else None,
                "tolerance": agreement.tolerance if agreement else None,
                "device": self.machine.device,
                "dtype": self.machine.dtype,
                "processes": self.machine.state.num_processes,
                "seconds": round(time.monotonic() - began, 1),
            }
            replace(self.source.lineage, stage="heal", writer=None, writer_reason=None, proof=None,
                    healing=healing, versions=versions()).write(folder)  # fmt: skip

    def _loss_with(self, adapter: Path, blocks: Blocks) -> float:
        from peft import PeftModel

        model = load_where_it_fits(
            self.source.folder, self.source.plan, dtype=self.machine.dtype, device=self.machine.device
        )
        return held_out_loss(PeftModel.from_pretrained(model, str(adapter)).eval(), blocks.held_out, batch=_EVAL_BATCH)
