"""What devices tell of themselves: that they are done, how much memory rose, how much energy went."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def describe(device: str) -> str:
    """What the numbers were measured on."""
    import torch

    return torch.cuda.get_device_name(torch.device(device)) if device.startswith("cuda") else device


def wait(device: Any) -> None:
    """Until the device has done what it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def working_memory(device: Any) -> Iterator[Callable[[], int | None]]:
    """Gives a function that, after the block, tells by how many bytes memory rose within it at most."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
    elif device.type == "cpu" and _reset_high_water():
        resident = _status("VmRSS")
        yield lambda: max(0, _status("VmHWM") - resident)
    else:
        yield lambda: None


def _reset_high_water() -> bool:
    """Have Linux forget the process's highest memory; False where it cannot."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def _status(name: str) -> int:
    """A size of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def joules(device: Any) -> float | None:
    """Energy that the GPU has used since its driver started; None where nothing reports it."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
    return None
