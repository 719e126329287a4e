"""Commands that several processes run together, started by ``torchrun`` or ``accelerate launch``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def together(device: str) -> Iterator[bool]:
    """Within the block the processes know one another; whether this is the one that writes and speaks."""
    from lmprune.forward.processes import Processes

    processes = Processes.join(cpu=device == "cpu")
    if not processes.main:
        logging.getLogger("lmprune").setLevel(logging.ERROR)
    try:
        yield processes.main
    finally:
        processes.leave()
