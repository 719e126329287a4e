"""`transformers.Trainer` underneath, with our loss and checkpoints; stops at the first loss that is no number."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from lmprune.errors import LmpruneError, OutputError, UsageError, line_of
from lmprune.forward.loss import Losses, standard_errors, targets
from lmprune.forward.machine import out_of_memory
from lmprune.healing.budget import spelled
from lmprune.healing.methods.base import Teacher, Training
from lmprune.healing.student import trained_tensors

LOGGER = logging.getLogger("lmprune")
WEIGHTS = "trained.safetensors"
"""What a checkpoint holds of the model: the parameters that train."""
STATE = "trainer_state.json"
SILENCE = 20.0
"""Seconds after which a step is told even without an evaluation."""


class BlockData(Dataset[dict[str, Tensor]]):
    """``length`` blocks; with a seed, in a new order each time all have been read.

    Labels are the inputs themselves, without the token ``unscored``. ``places`` keeps documents apart, as in
    `lmprune.text.blocks.Blocks`.
    """

    def __init__(
        self,
        blocks: NDArray[np.int32],
        length: int | None = None,
        seed: int | None = None,
        unscored: int | None = None,
        places: Callable[[NDArray[np.int32]], NDArray[np.int64]] | None = None,
    ) -> None:
        self.blocks, self.length, self.seed, self.unscored = blocks, length or len(blocks), seed, unscored
        self.places = places
        self._epoch, self._order = -1, np.arange(len(blocks))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, place = divmod(index, len(self.blocks))
        if self.seed is not None and epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.blocks))
        block = self.blocks[self._order[place]]
        ids = torch.from_numpy(block.astype(np.int64))
        labels = targets(ids, self.unscored).clone()
        labels[0] = -100  # nothing predicts the first token, and Trainer counts labels to scale the loss
        found = {"input_ids": ids, "labels": labels}
        return found if self.places is None else found | {"position_ids": torch.from_numpy(self.places(block))}


@dataclass(frozen=True)
class Levels:
    """Held-out losses that progress is measured against, block by block; ``of_original`` is None without a base."""

    of_pruned: Losses
    of_original: Losses | None

    @property
    def pruned(self) -> float:
        """Nats per token."""
        return float(self.of_pruned.mean()[0])

    @property
    def original(self) -> float | None:
        """Nats per token."""
        return None if self.of_original is None else float(self.of_original.mean()[0])

    def closed(self, loss: float) -> float | None:
        """Share of the loss gap between pruned and original that is closed at ``loss``; None where there is no gap."""
        if self.original is None or self.pruned - self.original <= 0:
            return None
        return (self.pruned - loss) / (self.pruned - self.original)

    def closed_error(self, healed: Losses) -> float | None:
        """The standard error of `closed`, over the same blocks: that of a ratio of two means."""
        share = self.closed(float(healed.mean()[0]))
        if share is None or self.of_original is None:
            return None
        pruned, original = self.of_pruned.values, self.of_original.values
        apart = (pruned - healed.values) - share * (pruned - original)
        gap = float((pruned - original)[0] @ healed.weights)
        return float(standard_errors(apart, healed.weights)[0]) / gap


class HealTrainer(Trainer):
    """Trains what a method left trainable, and saves just that."""

    def __init__(self, *, teacher: Teacher | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.teacher = teacher
        self.remove_callback(PrinterCallback)
        if teacher is not None:
            # Our loss is a mean over equally long blocks, which Trainer then averages over accumulation steps itself.
            self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The teacher's loss while training with one, otherwise Trainer's own."""
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        apart = {name: inputs[name] for name in ("position_ids",) if name in inputs}
        return self.teacher.loss(model, inputs["input_ids"], inputs["labels"], **apart)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward pass.

        Raises:
            LmpruneError: the loss is not a finite number.
        """
        loss: Tensor = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            self._stop(f"the loss became {float(loss)} at step {self.state.global_step + 1}")
        return loss

    def _stop(self, what: str) -> None:
        kept = complete_checkpoints(Path(self.args.output_dir))
        last = f"The last good checkpoint is {kept[-1]}" if kept else "There is no checkpoint yet"
        rate = self.args.learning_rate
        raise LmpruneError(f"{what}. {last}. Run again with --no-resume and a smaller --lr than {rate:g}")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the parameters that train. Every process must come here: FSDP gathers what each has of them."""
        live = trained_tensors(self.accelerator.unwrap_model(self.model))
        tensors = {name: _whole(value.detach()).cpu().contiguous() for name, value in live.items()}
        if self.args.should_save:
            self._save_tensors(Path(output_dir or self.args.output_dir), tensors)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, in one line where it cannot be written.

        Raises:
            OutputError: it cannot; those before it are whole.
        """
        work = Path(self.args.output_dir)
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as exc:
            if out_of_memory(exc):
                raise
            kept = complete_checkpoints(work)
            ahead = f"goes on after step {kept[-1].name[11:]}" if kept else "begins again"
            raise OutputError(
                f"cannot write a checkpoint to {work}: {line_of(exc)}. Make room for it: the same command then {ahead}"
            ) from exc

    def _save_tensors(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if broken := [name for name, value in tensors.items() if not torch.isfinite(value).all()]:
            shutil.rmtree(folder)
            self._stop(f"{broken[0]} is no longer finite at step {self.state.global_step}")
        save_file(tensors, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(model if model is not None else self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        load_trained(self.model, Path(self.state.best_model_checkpoint))


def load_trained(model: nn.Module, folder: Path) -> None:
    """Put the parameters of a checkpoint into ``model``."""
    stored, live = load_file(folder / WEIGHTS), trained_tensors(model)
    assert stored.keys() == live.keys(), "a checkpoint of another run passed the check of its settings"
    with torch.no_grad():
        for name, parameter in live.items():
            parameter.copy_(_as_spread_as(parameter, stored[name]))


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which FSDP gave this process a share."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _as_spread_as(parameter: Tensor, value: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were written to their end, oldest first. Trainer writes its state last."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    return [path for path in sorted(found, key=lambda path: int(path.name[11:])) if _is_complete(path)]


def _is_complete(path: Path) -> bool:
    try:
        json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (path / WEIGHTS).is_file()


class Progress(TrainerCallback):
    """One line on stderr for each evaluation: step, held-out loss, share of the gap closed, time left.

    And one for steps between, so that nobody waits for a sign longer than `SILENCE` seconds or one step.
    """

    def __init__(self, levels: Levels) -> None:
        self.levels = levels
        self.started, self.first, self.spoke = 0.0, 0, 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.started, self.first = time.monotonic(), state.global_step
        self.spoke = self.started

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if time.monotonic() - self.spoke > SILENCE:
            self._say(state, f"step {state.global_step}/{state.max_steps}")

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = kwargs["metrics"]["eval_loss"]
        closed = self.levels.closed(loss)
        gap = "" if closed is None else f", gap closed {closed:.0%}"
        self._say(state, f"step {state.global_step}/{state.max_steps}: held-out loss {loss:.4f}{gap}")

    def _say(self, state: TrainerState, line: str) -> None:
        self.spoke = time.monotonic()
        if not state.is_world_process_zero:
            return
        done = state.global_step - self.first
        left = (state.max_steps - state.global_step) * (self.spoke - self.started) / done if done else 0.0
        LOGGER.info(f"{line}, {spelled(left)} left" if left else line)


class Deadline(TrainerCallback):
    """Stop, with an evaluation and a checkpoint, before a step that would end after the clock says ``latest``."""

    def __init__(self, latest: float) -> None:
        self.latest = latest
        self._before, self._longest = 0.0, 0.0

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._before = time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.monotonic()
        self._longest = max(self._longest, now - self._before)
        if now + self._longest > self.latest and state.global_step < state.max_steps:
            LOGGER.info("step %s/%s: the time that was given is over", state.global_step, state.max_steps)
            control.should_training_stop = control.should_evaluate = control.should_save = True


class LastStep(TrainerCallback):
    """Evaluate after the last step too, so that the last checkpoint can be the best."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_evaluate |= state.global_step >= state.max_steps


class Patience(TrainerCallback):
    """Stop after ``limit`` evaluations without a better loss, counted from the log: a resumed run counts alike."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop |= self.is_over(state)

    def is_over(self, state: TrainerState) -> bool:
        """Whether patience has come to its end."""
        losses = eval_losses(state.log_history)
        best = min(range(len(losses)), key=lambda i: losses[i][1])
        return len(losses) - 1 - best >= self.limit


def eval_losses(history: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, held-out loss) of each evaluation in Trainer's log."""
    return [(int(row["step"]), float(row["eval_loss"])) for row in history if "eval_loss" in row]


def train_losses(history: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, training loss) of each log line."""
    return [(int(row["step"]), float(row["loss"])) for row in history if "loss" in row]


def micro_batch(
    method: Training, wanted: int | None, processes: int, *, block: int = 0, memory: int = 1 << 62
) -> tuple[int, int]:
    """Blocks per device at once, and how often gradients are accumulated before a step.

    By default 4096 tokens' worth, and fewer where they would take more than half of ``memory``, bytes that are free.

    Args:
        block: bytes that a step needs for each block; see `block_bytes`.

    Raises:
        LmpruneError: the batch cannot be split evenly.
    """
    share, rest = divmod(method.batch_size, processes)
    if rest or not share:
        raise LmpruneError(
            f"--batch-size {method.batch_size} cannot be split over {processes} processes. Use a multiple of that"
        )
    if wanted is None:
        most = max(1, min(share, 4096 // method.max_length, memory // 2 // max(1, block)))
        wanted = next(n for n in range(most, 0, -1) if share % n == 0)
    if wanted < 1 or share % wanted:
        raise LmpruneError(
            f"--micro-batch-size {wanted} does not divide the {share} blocks that a device gets per step. Give a "
            f"--batch-size that it divides, not {method.batch_size}"
        )
    return wanted, share // wanted


def block_bytes(config: Any, length: int, *, itemsize: int, taught: bool, recomputed: bool) -> int:
    """About what a step needs of memory for a block of ``length`` tokens, besides weights; rather more than less.

    On the CPU memory is not refused but taken until the system kills the process, so it cannot be found out by trying.

    Args:
        config: of the model's text part.
        itemsize: bytes of a number where the work is done.
        taught: whether a teacher's logits stand beside the student's.
        recomputed: whether a layer's activations are computed again.
    """
    hidden = int(getattr(config, "hidden_size", 0) or 0)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    inner = max(inner) if isinstance(inner, (list, tuple)) else int(inner)
    layers = int(getattr(config, "num_hidden_layers", 1) or 1)
    within = itemsize * (12 * hidden + 4 * inner)
    activations = layers * itemsize * hidden + within if recomputed else layers * within
    return length * (4 * _LOGITS_COPIES * (1 + taught) * int(config.vocab_size) + activations)


_LOGITS_COPIES = 4
"""Of the logits in float32 in one step: themselves, in float32, their loss's, their gradient."""


def check_loggers(names: str) -> None:
    """Make sure that Trainer has each of the loggers, which it would say only when it starts.

    Raises:
        UsageError: it does not know one, or its package is not installed.
    """
    if "none" in names.split(",") and names != "none":
        raise UsageError(f"--report-to {names}: none cannot stand beside others")
    for name in names.split(","):
        try:
            for logger in get_reporting_integration_callbacks(None if name == "none" else [name]):
                logger()
        except (ValueError, RuntimeError, ImportError) as exc:
            raise UsageError(f"--report-to {name}: {str(exc).splitlines()[0]}") from exc


class _Arguments(TrainingArguments):
    """On the one device of this process; by itself Trainer spreads batches over all GPUs that it sees."""

    @property
    def device(self) -> torch.device:
        """That of Accelerate, which `lmprune.healing.machine` has chosen."""
        _ = super().device  # makes the first GPU the current one
        device: torch.device = self.distributed_state.device
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        return device

    @property
    def n_gpu(self) -> int:
        """One at most."""
        return min(super().n_gpu, 1)


def arguments(
    method: Training,
    folder: Path,
    *,
    seed: int,
    micro: int,
    accumulate: int,
    cpu: bool,
    bf16: bool,
    gradient_checkpointing: bool,
    report_to: str,
    first_run: bool,
) -> TrainingArguments:
    """Our settings in Trainer's words."""
    return _Arguments(
        output_dir=str(folder),
        max_steps=method.steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=accumulate,
        learning_rate=method.lr,
        warmup_steps=method.warmup,
        lr_scheduler_type=method.schedule,
        weight_decay=method.weight_decay,
        gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if gradient_checkpointing else None,
        bf16=bf16,
        use_cpu=cpu,
        seed=seed,
        eval_strategy="steps",
        eval_steps=method.eval_every,
        eval_on_start=first_run,
        save_strategy="steps",
        save_steps=method.eval_every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,
        logging_steps=max(1, method.steps // 100),
        logging_nan_inf_filter=False,
        report_to=report_to.split(","),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not cpu,
        ddp_find_unused_parameters=False,
        label_names=["labels"],
    )
