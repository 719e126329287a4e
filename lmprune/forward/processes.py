"""Several processes, started by ``accelerate launch`` or ``torchrun``, share the samples."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """This process's place among ``size``."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> Processes:
        """Meet the other processes if the launcher's environment speaks of any."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not dist.is_initialized():
            # gloo also between GPUs: what is exchanged is a few kilobytes a batch, and it lies on the CPU.
            dist.init_process_group("gloo")
        return cls(dist.get_rank(), size)

    @property
    def main(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    @property
    def local_rank(self) -> int:
        """This process's place on its machine, which picks its GPU."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    def gather(self, mine: Any) -> list[Any]:
        """What every process gives, by rank."""
        if self.size == 1:
            return [mine]
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, mine)
        return every

    def from_main(self, value: Any) -> Any:
        """What the main process gives."""
        if self.size == 1:
            return value
        shared = [value]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]

    def leave(self) -> None:
        """Part from the others."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
