"""Where healing works, in which type, and in how many processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import PartialState

from lmprune.errors import UsageError
from lmprune.forward.machine import multiplies, pick_device
from lmprune.healing.settings import HealSettings

_DEVICE = "ACCELERATE_TORCH_DEVICE"
"""Accelerate takes a device from this variable alone."""


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
    def of(cls, settings: HealSettings, stored: str = "float32") -> Machine:
        """The device that was asked for; for ``auto`` the GPU, else the CPU.

        Args:
            stored: the type of the model's weights. On a CPU that multiplies bfloat16, those of that type are computed
                in it: what is frozen has no more digits, and what trains is in float32 all the same.
        """
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        pick_device(device)
        if fsdp() and os.environ.get("FSDP_VERSION") != "2":
            raise UsageError("FSDP 1 flattens frozen and trained weights together. Launch with --fsdp_version 2")
        dtype = settings.dtype
        if dtype == "auto":
            usual = device != "cpu" or (stored == "bfloat16" and multiplies(torch.bfloat16))
            dtype = "bfloat16" if usual else "float32"
        os.environ.pop(_DEVICE, None)
        if ":" in device:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise UsageError(
                    f"--device {device}: of several processes each has a GPU of its own. Use --device cuda"
                )
            os.environ[_DEVICE] = device
        # The others wait while the main process measures, merges and proves, which may take longer than torch allows.
        state = PartialState(cpu=device == "cpu", timeout=timedelta(days=1))
        return cls(str(state.device), dtype, state)


def fsdp() -> bool:
    """Whether `accelerate launch` was asked to spread the weights over processes."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def alone() -> bool:
    """Whether one process does all of it."""
    return os.environ.get("WORLD_SIZE", "1") == "1" and not fsdp()
