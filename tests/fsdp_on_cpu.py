"""``lmprune`` under FSDP 2 on the CPU, for tests: ``torchrun --nproc_per_node 2 tests/fsdp_on_cpu.py heal ...``.

Accelerate chooses FSDP only between accelerators, although torch has it for CPUs as well. Only that choice is replaced.
"""

from __future__ import annotations

import os
from typing import Any

import torch

os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
torch.distributed.init_process_group("gloo")

from accelerate import state  # noqa: E402

from lmprune.cli import main  # noqa: E402


def _backend(self: Any, *args: Any, **kwargs: Any) -> tuple[str, state.DistributedType]:
    return "gloo", state.DistributedType.MULTI_GPU


def _device(self: Any) -> None:
    self.device = torch.device("cpu")


state.PartialState._prepare_backend = _backend
state.PartialState.set_device = _device
main()
