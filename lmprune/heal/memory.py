"""When memory ran out: which setting would fit, found by trying one step of each."""

from __future__ import annotations

import gc
from typing import Any

import torch

from lmprune.heal.settings import Resolved


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether torch could not get memory, from an accelerator or from the system."""
    return isinstance(exc, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(exc)


def advice(trainer: Any, settings: Resolved, micro: int, *, checkpointing: bool) -> str:
    """One line for the user; ``micro`` blocks at once were too many."""
    line = f"out of memory with {micro} blocks of {settings.max_length} tokens at once"
    ways = [
        (n, recompute) for recompute in (False, True) if recompute >= checkpointing for n in _below(micro, recompute)
    ]
    # Other processes would wait for the gradients of a step that they do not try.
    fitting = next((way for way in ways if _fits(trainer, *way)), None) if trainer.args.world_size == 1 else None
    if fitting is not None:
        n, recompute = fitting
        options = f"--micro-batch {n}" + (" --gradient-checkpointing" if recompute and not checkpointing else "")
        return f"{line}. Use {options}, which was tried and fits; the training stays the same"
    guess = [f"--micro-batch {micro // 2}"] if micro > 1 and trainer.args.world_size > 1 else []
    if not checkpointing and trainer.args.world_size > 1:
        guess.append("--gradient-checkpointing")
    if settings.bits == 16:
        guess.append(f"--method qlora{'+distill' if settings.distill else ''}")
    guess.append(f"--max-length {settings.max_length // 2}")
    tried = "" if trainer.args.world_size > 1 else ", and one block at once with --gradient-checkpointing does not fit"
    return f"{line}{tried}. Use {' or '.join(guess)}"


def _below(micro: int, recompute: bool) -> list[int]:
    """Smaller divisors of ``micro``, largest first; itself too where activations are to be recomputed."""
    return [n for n in range(micro if recompute else micro - 1, 0, -1) if micro % n == 0]


def _fits(trainer: Any, micro: int, recompute: bool) -> bool:
    """Whether a whole step on ``micro`` blocks works. It changes the weights, which the run has given up anyway."""
    model = trainer.model
    if trainer.optimizer is not None:
        trainer.optimizer.zero_grad(set_to_none=True)
    _release()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    rows = [trainer.train_dataset[i] for i in range(micro)]
    batch = {key: torch.stack([row[key] for row in rows]).to(model.device) for key in rows[0]}
    try:
        trainer.training_step(model, batch)
        if trainer.optimizer is not None:
            trainer.optimizer.step()
    except RuntimeError as exc:
        if not is_out_of_memory(exc):
            raise
        return False
    return True


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
