"""From the cut model and blocks of text to a model that has learnt: by training, or by a closed form."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerState

from lmprune.cuts.plan import Plan
from lmprune.errors import LmpruneError, OutputError, UsageError, sized
from lmprune.files import read_json, write_json
from lmprune.forward.machine import free_memory, out_of_memory, release
from lmprune.healing import training
from lmprune.healing.budget import EVALUATIONS, Course, spelled
from lmprune.healing.keeping import Kept
from lmprune.healing.machine import Machine, fsdp
from lmprune.healing.memory import advice
from lmprune.healing.methods.base import Method, Repairing, Teacher, Training
from lmprune.healing.one_by_one import in_files, one_by_one
from lmprune.healing.pacing import measure
from lmprune.healing.readers import is_turned
from lmprune.healing.repairing import Repair
from lmprune.healing.settings import HealSettings, Resolved
from lmprune.healing.student import live, live_where_it_fits, prepare, trained_tensors
from lmprune.models.cut import Cut
from lmprune.models.loading import load_model
from lmprune.models.locate import ModelFolder
from lmprune.text.blocks import Blocks

LOGGER = logging.getLogger("lmprune")


@dataclass
class Learnt:
    """What came of it.

    Attributes:
        student: the changed model; None in processes that write nothing.
        steps, best_step: optimizer steps made, and after which the best weights were; 0 where nothing trained.
        held_out, training: (step, loss) as they came.
        repair: what a closed form noted.
        maps: the tensors of a patch, where that is what was made.
        way: the method with the steps that were planned.
        course: None where nothing trained.
    """

    student: nn.Module | None
    steps: int = 0
    best_step: int = 0
    held_out: list[tuple[int, float]] = field(default_factory=list)
    training: list[tuple[int, float]] = field(default_factory=list)
    repair: Mapping[str, Any] | None = None
    maps: Mapping[str, Tensor] | None = None
    way: Method | None = None
    course: Course | None = None

    def hand_over(self) -> nn.Module:
        """The student, which is forgotten here, so that its memory goes when the caller lets go of it."""
        student, self.student = self.student, None
        assert student is not None, "it is handed over once, in the process that writes"
        return student


@dataclass(frozen=True)
class Learning:
    """One run's way from the cut model to the changed one.

    Attributes:
        base: the unpruned model; None where it is not needed.
        folder: where Trainer keeps its checkpoints.
        streamed: whether a repair that can reads one layer at a time.
        deadline: when all must be at its end, in `time.monotonic`'s seconds; None: no matter.
    """

    cut: Cut
    base: ModelFolder | None
    plan: Plan | None
    settings: HealSettings
    resolved: Resolved
    machine: Machine
    folder: Path
    streamed: bool = False
    deadline: float | None = None

    @property
    def solved(self) -> Path:
        """Where a closed form keeps what it has solved."""
        return self.folder.with_name(f"{self.resolved.method.partition('+')[0]}-solved")

    @property
    def stream(self) -> bool:
        """Whether the models are read layer by layer."""
        method = self.resolved.way
        return self.streamed and isinstance(method, Repairing) and method.streams

    def learn(self, blocks: Blocks, levels: training.Levels) -> Learnt:
        """Change the model, as the method does."""
        method = self.resolved.way
        if isinstance(method, Repairing):
            return self._repaired(method, blocks)
        assert isinstance(method, Training)
        return self._trained(method, blocks, levels)

    # --- closed forms -------------------------------------------------------------------------------------------

    def _repaired(self, method: Repairing, blocks: Blocks) -> Learnt:
        assert self.base is not None and self.plan is not None, "the run has made sure of both"
        LOGGER.info("%s: fitted on %s", self.resolved.method, blocks.source)
        kept = Kept(self.solved)
        if self.stream:
            where, base = self.machine.device, Cut(self.base)
            student: Any
            whole: Any
            if is_turned(self.plan):
                student, whole = in_files(self.cut, base, self.folder.parent)
            else:
                student, whole = one_by_one(self.cut, where), one_by_one(base, where)
            work = Repair(student, whole, self.plan, blocks.train, blocks.held_out, blocks.unscored, kept=kept)
            noted = method.repair(work)
            return Learnt(None, repair=noted)
        how = {"dtype": "float32", "device": self.machine.device}
        student, notes = prepare(live_where_it_fits(self.cut, **how), method, self.plan, self.resolved.seed)
        self._tell(notes)
        whole = live_where_it_fits(Cut(self.base), **how)
        work = Repair(
            student.eval(), whole.eval(), self.plan, blocks.train, blocks.held_out, blocks.unscored, kept=kept
        )
        noted = method.repair(work)
        return Learnt(student, repair=noted, maps=work.maps)

    # --- training -----------------------------------------------------------------------------------------------

    def _ready(self) -> tuple[nn.Module, Teacher | None]:
        """The student, ready to train, and its teacher."""
        method = self.resolved.way
        # FSDP takes its share of a layer to the device itself; the whole may not fit there.
        how: Mapping[str, Any] = {
            "dtype": self.machine.dtype,
            "device": "cpu" if fsdp() else self.machine.device,
            "quantization": method.quantization,
        }
        teacher = None
        if self.resolved.lesson is not None:
            assert self.base is not None and self.plan is not None, "the run has made sure of both"
            model = load_model(self.base.path, **how)
            if self.plan.parts or self.resolved.first:  # its layers are no longer those of the whole model
                teacher, model = self.resolved.lesson.apart(model, self.plan), live(self.cut, **how)
            else:
                teacher = self.resolved.lesson.take_apart(model, self.plan)
        else:
            model = live(self.cut, **how)
        model.config.use_cache = False
        student, notes = prepare(model, method, self.plan, self.resolved.seed)
        self._tell(notes)
        if teacher is not None:
            teacher.freeze_twins(student, adapter=method.adapter)
        return student, teacher

    def in_time(self) -> Training:
        """The method with the most steps that can end before the deadline, before any text is read.

        Raises:
            UsageError: there is no time for one.
        """
        method = self.resolved.way
        assert isinstance(method, Training)
        if not self._course_file.is_file():
            began = time.monotonic()
            student, teacher = self._ready()
            self._course(method, student, teacher, time.monotonic() - began)
            del student, teacher
            release()
        return self._settled(method, self._kept_course())

    def _settled(self, method: Training, course: Course) -> Training:
        """``method`` with the steps that there is time for, which is kept; as planned where checkpoints are there."""
        if self.deadline is None:
            return method
        chosen: int | None = getattr(self.settings, "eval_every", None)
        steps = course.steps
        if not training.complete_checkpoints(self.folder):
            if course.pace is None:
                raise LmpruneError("--budget: memory ran out before the first step. Give a smaller --micro-batch-size")
            left = self.deadline - time.monotonic()
            steps = course.pace.steps(left, chosen)
            if steps < 1:
                least = course.pace.end + course.pace.training(1, 1)
                raise UsageError(
                    f"--budget {self.settings.budget}: one step and all that comes after it take about "
                    f"{spelled(least)}, and {spelled(max(0.0, left))} is left. Give more time"
                )
            write_json(self._course_file, replace(course, steps=steps).to_data())
        warmup = getattr(self.settings, "warmup", None)
        return replace(
            method,
            steps=steps,
            eval_every=chosen or -(-steps // EVALUATIONS),
            warmup=min(method.warmup, steps // 10) if warmup is None else warmup,
        )

    @property
    def _course_file(self) -> Path:
        return self.folder.with_name("course.json")

    def _kept_course(self) -> Course:
        return Course.from_data(read_json(self._course_file, OutputError, "Add --no-resume"))

    def require_block(self) -> None:
        """Make sure, before a repair takes its time, that a block fits besides the weights; later more is known.

        Raises:
            LmpruneError: it does not.
        """
        method = self.resolved.way
        if not isinstance(method, Training) or not self.machine.cpu:
            return
        config = self.cut.whole_config.get_text_config()
        block = self._block(method, config, taught=self.resolved.lesson is not None)
        if block > (memory := free_memory(self.machine.device)):
            raise LmpruneError(_too_little(method, block, memory, config.vocab_size))

    def _block(self, method: Training, config: Any, *, taught: bool = False) -> int:
        """Bytes of one block on its way through the model and back."""
        return training.block_bytes(
            config,
            method.max_length,
            itemsize=2 if self.machine.bf16 else 4,
            taught=taught,
            recomputed=self.settings.gradient_checkpointing,
        )

    def _course(self, method: Training, student: Any, teacher: Teacher | None, load: float) -> Course:
        """What was settled before, or is now: by the main process, for all."""
        with self.machine.state.main_process_first():
            if self._course_file.is_file():
                return self._kept_course()
            trained = 12 * sum(p.numel() for p in trained_tensors(student).values())  # gradients and AdamW's two means
            processes = self.machine.state.num_processes
            recomputed = self.settings.gradient_checkpointing
            block = self._block(method, student.config.get_text_config(), taught=teacher is not None)
            memory = free_memory(self.machine.device) - trained // (processes if fsdp() else 1)
            micro, accumulate = training.micro_batch(
                method, self.settings.micro_batch_size, processes, block=block, memory=max(0, memory)
            )
            if self.machine.cpu and micro == 1 and block > max(0, memory):
                # Nothing would be refused there: the system ends the process.
                raise LmpruneError(_too_little(method, block, memory, student.config.get_text_config().vocab_size))
            if recomputed:
                student.gradient_checkpointing_enable({"use_reentrant": False})
            pace = None  # where FSDP has not yet given each process its share, no step fits
            if not fsdp():
                pace = measure(student, teacher, method, micro, accumulate, bf16=self.machine.bf16, load=load)
            course = Course(micro, method.steps, pace)
            write_json(self._course_file, course.to_data())
            return course

    def _trained(self, method: Training, blocks: Blocks, levels: training.Levels) -> Learnt:
        """The student with its best weights."""
        began = time.monotonic()
        student, teacher = self._ready()
        kept = training.complete_checkpoints(self.folder)
        count = sum(p.numel() for p in trained_tensors(student).values())
        self._tell([f"{self.resolved.method}: {count:,} parameters train, on {blocks.source}"])
        course = self._course(method, student, teacher, time.monotonic() - began)
        method = self._settled(method, course)
        if not kept:
            self._tell([_foretold(method, course, len(blocks.train))])
        trainer = self._trainer(method, course, student, teacher, blocks, levels, first_run=not kept)
        if self.settings.patience and kept:
            reached = TrainerState.load_from_json(str(kept[-1] / training.STATE))
            if training.Patience(self.settings.patience).is_over(reached):  # killed after its end
                training.load_trained(student, Path(str(reached.best_model_checkpoint)))
                return _learnt(student, reached, method, course)
        ran_out = False
        try:
            trainer.train(resume_from_checkpoint=str(kept[-1]) if kept else None)
        except RuntimeError as exc:
            if not out_of_memory(exc):
                raise
            ran_out = True
        if ran_out:  # and the exception, which held on to the activations, is gone
            line = advice(
                trainer,
                method,
                self.resolved.spelled,
                trainer.args.per_device_train_batch_size,
                checkpointing=self.settings.gradient_checkpointing,
            )
            raise LmpruneError(line)
        if not fsdp():
            return _learnt(student, trainer.state, method, course)
        state = trainer.state
        del trainer, student
        release()
        return _learnt(self._unspread(Path(state.best_model_checkpoint)), state, method, course)

    def _trainer(
        self,
        method: Training,
        course: Course,
        student: nn.Module,
        teacher: Teacher | None,
        blocks: Blocks,
        levels: training.Levels,
        *,
        first_run: bool,
    ) -> training.HealTrainer:
        micro, accumulate = training.micro_batch(method, course.micro_batch, self.machine.state.num_processes)
        callbacks: list[Any] = [training.Progress(levels), training.LastStep()]
        if self.settings.patience:
            callbacks.append(training.Patience(self.settings.patience))
        if self.deadline is not None and course.pace is not None:
            callbacks.append(training.Deadline(self.deadline - course.pace.end - course.pace.held_out))
        return training.HealTrainer(
            teacher=teacher,
            model=student,
            args=training.arguments(
                method,
                self.folder,
                seed=self.resolved.seed,
                micro=micro,
                accumulate=accumulate,
                cpu=self.machine.cpu,
                bf16=self.machine.bf16,
                gradient_checkpointing=self.settings.gradient_checkpointing,
                report_to=self.settings.report_to,
                first_run=first_run,
            ),
            train_dataset=training.BlockData(
                blocks.train, method.blocks, self.resolved.seed, blocks.unscored, blocks.places
            ),
            eval_dataset=training.BlockData(blocks.held_out, unscored=blocks.unscored, places=blocks.places),
            callbacks=callbacks,
        )

    def _unspread(self, best: Path) -> nn.Module | None:
        """After FSDP: the trained student whole again, in the process that writes."""
        if not self.machine.main:
            return None
        student, _ = self._ready()
        training.load_trained(student, best)
        return student

    def _tell(self, notes: list[str]) -> None:
        if self.machine.main:
            for note in notes:
                LOGGER.info(note)


def _too_little(method: Training, block: int, memory: int, vocabulary: int) -> str:
    """That one block is too many, and what would fit."""
    fits = max(2, int(method.max_length * max(0, memory) / block) // 8 * 8)
    return (
        f"one block of {method.max_length} tokens of a vocabulary of {vocabulary:,} takes about {sized(block)} "
        f"besides the weights, and {sized(max(0, memory))} are free. Use --max-length {fits} or "
        "--gradient-checkpointing, or free memory"
    )


def _foretold(method: Training, course: Course, blocks: int) -> str:
    """What is going to happen, in one line."""
    tokens = method.blocks * method.max_length
    line = f"{method.steps} steps of {method.batch_size} blocks of {method.max_length} tokens"
    if course.pace is not None:
        seconds = course.pace.training(method.steps, method.eval_every) + course.pace.end
        line += f", about {spelled(seconds)} by the speed of the first ({course.pace.step:.2g} s a step)"
    return f"{line}; {tokens:,} tokens, each read {max(1.0, method.blocks / blocks):.1f} times"


def _learnt(student: nn.Module | None, state: Any, method: Training, course: Course) -> Learnt:
    history = state.log_history
    return Learnt(
        student,
        state.global_step,
        state.best_global_step,
        training.eval_losses(history),
        training.train_losses(history),
        way=method,
        course=course,
    )
