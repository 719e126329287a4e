"""Single tensors between a checkpoint's bytes and torch."""

from __future__ import annotations

import torch
from torch import Tensor

from lmprune.errors import ModelError
from lmprune.models.checkpoint import TensorEntry
from lmprune.models.dtypes import stored_type


def read_tensor(entry: TensorEntry) -> Tensor:
    """One tensor, read and not mapped: mapped pages would count as memory for as long as the system likes.

    Raises:
        ModelError: torch has no such type, or the file is shorter than its header says.
    """
    dtype = stored_type(entry.dtype)
    if dtype is None:
        raise ModelError(f"{entry.file} holds tensors of type {entry.dtype}, which torch cannot read")
    content = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        if len(content) and file.readinto(memoryview(content.numpy())) != len(content):
            raise ModelError(f"{entry.file} is truncated. Download it again")
    return content.view(dtype).reshape(entry.shape)


def tensor_bytes(tensor: Tensor) -> bytes:
    """What a checkpoint holds of a tensor."""
    return bytes(tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes())
