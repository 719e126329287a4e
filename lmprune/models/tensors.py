"""Single tensors between a checkpoint's bytes and torch."""

from __future__ import annotations

import torch
from safetensors.torch import load
from torch import Tensor

from lmprune.cuts.beside import Beside
from lmprune.errors import ModelError, RecipeError, told_as
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


def tensors_beside(beside: Beside) -> dict[str, Tensor]:
    """The tensors of a file beside a recipe, read from the very bytes whose hash was checked.

    Raises:
        RecipeError: it is missing, not the one that the recipe names, or no such file.
    """
    with told_as(RecipeError, f"{beside.path} cannot be read"):
        return load(beside.content())


def tensor_bytes(tensor: Tensor) -> bytes:
    """What a checkpoint holds of a tensor."""
    return bytes(tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes())
