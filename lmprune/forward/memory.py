"""Memory of the machine and its accelerator: told when it runs out, and given back."""

from __future__ import annotations

import gc

import torch


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
