"""How fast a prepared student trains on this machine: one step timed, which changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lmprune.forward.machine import out_of_memory, release
from lmprune.healing.budget import Pace
from lmprune.healing.methods.base import Teacher, Training
from lmprune.healing.student import trained_tensors


def measure(
    student: Any,
    teacher: Teacher | None,
    method: Training,
    micro: int,
    accumulate: int,
    *,
    bf16: bool,
    load: float,
) -> Pace | None:
    """The pace of ``student`` on ``micro`` blocks at once; None where memory runs out, of which training tells more.

    Random tokens take as long as any. The optimizer's rate is 0, so that no weight changes.
    """
    vocabulary, device = student.config.get_text_config().vocab_size, student.device
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (micro, method.max_length), generator=draws).to(device)

    def forward() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            if teacher is not None and student.training:
                return teacher.loss(student, ids)
            found: Tensor = student(input_ids=ids, labels=ids, use_cache=False).loss
            return found

    tensors = list(trained_tensors(student).values())
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            return _measured(student, forward, tensors, method, micro, accumulate, load)
        except (MemoryError, RuntimeError) as exc:
            if not out_of_memory(exc):
                raise
        finally:
            for tensor in tensors:
                tensor.grad = None
    release()
    return None


def _measured(
    student: Any,
    forward: Callable[[], Tensor],
    tensors: list[Tensor],
    method: Training,
    micro: int,
    accumulate: int,
    load: float,
) -> Pace:
    student.train()
    forward().backward()  # the first pass of all warms up
    optimizer = torch.optim.AdamW(tensors, lr=0.0, weight_decay=0.0)
    optimizer.step()
    each = _seconds(lambda: forward().backward(), student.device)
    update = _seconds(optimizer.step, student.device)
    student.eval()
    with torch.no_grad():
        held_out = _seconds(forward, student.device) * -(-method.eval_blocks // micro)
    return Pace(each * accumulate + update, held_out, load)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    began = time.monotonic()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic() - began
