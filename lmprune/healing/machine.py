"""Where healing works, in which type, and in how many processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import PartialState

from lmprune.errors import UsageError
from lmprune.healing.settings import HealSettings


@dataclass(frozen=True)
class Machine:
    """Where and in which type the work is done; the processes are Accelerate's."""

    device: str
    dtype: str
    state: PartialState

    @property
    def cpu(self) -> bool:
        """Whether there is no accelerator in use."""
        return self.device.startswith("cpu")  # of several processes Accelerate calls it cpu:0

    @property
    def bf16(self) -> bool:
        """Whether matrix products run in bfloat16 under autocast."""
        return self.dtype == "bfloat16"

    @property
    def main(self) -> bool:
        """Whether this process writes and speaks."""
        return bool(self.state.is_main_process)

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
