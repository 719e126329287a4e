"""Several processes, started by ``accelerate launch`` or ``torchrun``, share the samples. Accelerate holds them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object


@dataclass(frozen=True)
class Processes:
    """This process's place among ``size``; ``state`` is Accelerate's, None where a process is alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """This process's place on its machine, which picks its GPU."""
    state: PartialState | None = None

    @classmethod
    def join(cls, *, cpu: bool = False, backend: str | None = "gloo") -> Processes:
        """Meet the other processes, if the launcher's environment speaks of any; again, and it is the same meeting.

        Args:
            cpu: the work is done on the CPU, also where there are GPUs.
            backend: how they talk. gloo does between GPUs as well, and where two processes share one: what profiling
                exchanges is a few kilobytes a batch and lies on the CPU. None is Accelerate's choice, as training
                wants it.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()  # and no state, which would fix the device of all that runs in this process later
        # The others wait while the main process loads, measures and writes, which may be longer than torch allows.
        # Told of gloo but not of the CPU, Accelerate takes processes without a GPU for one.
        how: dict[str, Any] = {"cpu": cpu or not torch.cuda.is_available(), "timeout": timedelta(days=1)}
        state = PartialState(**how, **({"backend": backend} if backend else {}))
        return cls(state.process_index, state.num_processes, max(0, state.local_process_index), state)

    @property
    def main(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def gather(self, mine: Any) -> list[Any]:
        """What every process gives, by rank."""
        return [mine] if self.size == 1 else list(gather_object([mine]))

    def from_main(self, value: Any) -> Any:
        """What the main process gives."""
        return value if self.size == 1 else broadcast_object_list([value])[0]

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def leave(self) -> None:
        """Part from the others."""
        if self.state is not None:
            self.state.destroy_process_group()
