"""The machine: which device there is, how much memory is free on it, and what to do when memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Generic, TypeVar

import psutil
import torch

from lmprune.errors import LmpruneError, UsageError
from lmprune.models.carrying import cut_names
from lmprune.models.cut import Cut
from lmprune.settings import check_device

CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Where Linux says how much memory this group of processes may use."""
_SPARE = 0.9

Item = TypeVar("Item")
Result = TypeVar("Result")

# --- the device -------------------------------------------------------------------------------------------------------


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device of that name; for ``auto`` the fastest there is: a GPU, Apple's, the CPU.

    Args:
        local_rank: this process's place among those on this machine, each of which takes the next GPU.

    Raises:
        UsageError: it is no device, or none that is here.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        if count:
            return torch.device("cuda", local_rank % count)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    check_device(name)
    device = torch.device(name)
    if device.type == "cuda" and not count:
        raise UsageError(f"--device {name}: torch sees no CUDA device here. Use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(f"--device {name}: torch sees {count} CUDA devices here. Choose another, such as cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"--device {name}: torch sees no such device here. Choose another, such as cpu")
    return device


_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies numbers of that type fast: short ones by AVX-512's or AMX's instructions."""
    told: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    short = _SHORT.get(dtype)
    return short is None or bool(told.get(f"avx512_{short}") or told.get(f"amx_{short}"))


def type_to_run(cut: Cut, asked: str, device: torch.device | str, *, stream: bool | None = None) -> str:
    """The type to measure a model in: as asked. For ``auto`` on a CPU that does not multiply the checkpoint's, float32.

    The weights are the same and the numbers more exact, in a fraction of the time (docs/profiling.md). They stay as
    they are stored where only so they fit in memory, or not even so and nothing is read layer by layer.

    Args:
        stream: whether layers are read one by one; None: where the weights do not fit.
    """
    if asked != "auto" or torch.device(device).type != "cpu" or multiplies(stored := cut.dtype()):
        return asked
    wide, narrow = (fits(weights_bytes(cut, size), device) for size in (4, stored.itemsize))
    if wide or stream or (stream is None and not narrow):
        return "float32"
    return str(stored).removeprefix("torch.")


# --- free memory ------------------------------------------------------------------------------------------------------


def free_memory(device: torch.device | str = "cpu") -> int:
    """Free bytes on a device; on the CPU within the limits of its control group and of ``ulimit``."""
    if str(device).startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    free = [psutil.virtual_memory().available, *_within_ulimit()]
    with suppress(OSError, ValueError):  # no control group of version 2, or "max": no limit
        used = int((CONTROL_GROUP / "memory.current").read_text()) - _pages_of_files()
        free.append(int((CONTROL_GROUP / "memory.max").read_text()) - used)
    return max(0, min(free))


def _pages_of_files() -> int:
    """Bytes that a control group is charged for and gives back when they are wanted: what was read of files."""
    try:
        lines = (CONTROL_GROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    told = {name: int(value) for name, value in (line.split() for line in lines)}
    return max(0, told.get("active_file", 0) + told.get("inactive_file", 0) - told.get("file_dirty", 0))


def _within_ulimit() -> list[int]:
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return []
    usage = psutil.Process().memory_info()
    free = []
    for limit, used in ((resource.RLIMIT_AS, usage.vms), (resource.RLIMIT_DATA, getattr(usage, "data", usage.rss))):
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY:
            free.append(soft - used)
    return free


def weights_bytes(cut: Cut, itemsize: int) -> int:
    """Bytes of the weights that are left, once loaded with ``itemsize`` bytes a number."""
    if cut.plan is not None and any(part.kind == "width" for part in cut.plan.parts):
        return itemsize * sum(parameter.numel() for parameter in cut.empty().parameters())
    tensors = cut.checkpoint.tensors
    return itemsize * sum(prod(tensors[name].shape) for name in cut_names(tensors, cut.plan))


def fits(weights: int, device: torch.device | str) -> bool:
    """Whether weights of so many bytes can be held on ``device``."""
    return weights < _SPARE * free_memory(device)


# --- out of memory ----------------------------------------------------------------------------------------------------


def out_of_memory(exc: BaseException) -> bool:
    """Whether this is what torch raises when memory runs out, on a GPU or the CPU."""
    text = str(exc).lower()
    return (
        isinstance(exc, (torch.OutOfMemoryError, MemoryError))
        or "out of memory" in text
        or "can't allocate memory" in text
    )


def release() -> None:
    """Give the memory of deleted models back before the next is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Halving(Generic[Item, Result]):
    """Work on batches of items that is done in halves once memory has run out, from then on.

    Args:
        work: what is done to the items of a batch, or to a part of them.
        hopeless: the error to raise where memory does not even hold that one item.
        say: is told how many items were too many, and how many will be tried.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], Result],
        hopeless: Callable[[Item], LmpruneError],
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._work, self._hopeless, self._say = work, hopeless, say
        self._most: int | None = None  # items that memory has room for, once it has run out

    def __call__(self, items: Sequence[Item]) -> list[Result]:
        """What ``work`` gives for each part of ``items``, in order: one part, unless memory is short."""
        left, results = list(items), []
        while left:
            part = left[: self._most]
            result = self._tried(part)
            if result:
                results += result
                left = left[len(part) :]
        return results

    def _tried(self, part: list[Item]) -> list[Result]:
        """The result alone in a list; an empty list where memory ran out."""
        try:
            return [self._work(part)]
        except (MemoryError, RuntimeError) as exc:
            if not out_of_memory(exc):
                raise
            if len(part) == 1:
                raise self._hopeless(part[0]) from exc
        # Outside the except block: the exception's traceback would keep the memory of the failed pass alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._most = len(part) // 2
        if self._say is not None:
            self._say(f"out of memory with {len(part)} samples in a batch: going on with {self._most}")
        return []
