"""When memory ran out: which setting would fit, found by trying one step of each."""

from __future__ import annotations

from typing import Any

import torch

from lmprune.forward.machine import out_of_memory, release
from lmprune.healing.methods.base import Training


def advice(trainer: Any, method: Training, words: str, micro: int, *, checkpointing: bool) -> str:
    """One line for the user; ``micro`` blocks at once were too many.

    Args:
        words: how the method is spelled with what is joined to it, with ``{}`` for its name: ``refit+{}``.
    """
    line = f"out of memory with {micro} blocks of {method.max_length} tokens at once"
    ways = [
        (n, recompute) for recompute in sorted({checkpointing, True}) for n in _fewer(micro, recompute, checkpointing)
    ]
    if trainer.args.world_size > 1:
        # The other processes would wait for the gradients of a step that they do not try.
        options = [_spell(*way, checkpointing) for way in ways[:1]]
    else:
        fitting = next((way for way in ways if _fits(trainer, *way)), None)
        if fitting is not None:
            found = _spell(*fitting, checkpointing)
            return f"{line}. Use {found}, which was tried and fits; the training stays the same"
        line += ", and one block at once with --gradient-checkpointing does not fit"
        options = []
    if method.lighter is not None:
        options.append(f"--method {words.format(method.lighter)}")
    return f"{line}. Use {' or '.join([*options, f'--max-length {method.max_length // 2}'])}"


def _fewer(micro: int, recompute: bool, already: bool) -> list[int]:
    """Divisors of ``micro``, largest first; itself only where activations are newly recomputed."""
    most = micro if recompute and not already else micro - 1
    return [n for n in range(most, 0, -1) if micro % n == 0]


def _spell(micro: int, recompute: bool, already: bool) -> str:
    return f"--micro-batch-size {micro}" + (" --gradient-checkpointing" if recompute and not already else "")


def _fits(trainer: Any, micro: int, recompute: bool) -> bool:
    """Whether a whole step on ``micro`` blocks works. It changes the weights, which the run has given up anyway."""
    model = trainer.model
    # Memory may have run out in the middle of an accumulation, where optimizer.step() would do nothing.
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    if trainer.optimizer is not None:
        trainer.optimizer.zero_grad(set_to_none=True)
    release()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    rows = [trainer.train_dataset[i] for i in range(micro)]
    batch = {key: torch.stack([row[key] for row in rows]).to(model.device) for key in rows[0]}
    try:
        for _ in range(2):  # the second with gradients there already
            trainer.training_step(model, batch)
        if trainer.optimizer is not None:
            trainer.optimizer.step()
    except RuntimeError as exc:
        if not out_of_memory(exc):
            raise
        return False
    return True
