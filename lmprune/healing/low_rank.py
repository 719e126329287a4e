"""A repair as a LoRA adapter: the best change of so low a rank, by singular values. Recipe and adapter are enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmprune.errors import ModelError, UsageError
from lmprune.healing.writers import is_linear
from lmprune.models.adapters import add_lora, save_adapter


def write_low_rank(repaired: nn.Module, cut: Any, rank: int, folder: Path) -> float:
    """Write what ``repaired`` changes of ``cut`` as an adapter of ``rank``; ``cut`` is then within it.

    Returns:
        The share of the changes' squares that the rank keeps; 1 for a full rank.

    Raises:
        ModelError: it changes what no LoRA holds, as norms and biases.
        UsageError: it changes nothing.
    """
    changes = _changes(repaired, cut)
    if not changes:
        raise UsageError("--as-adapter: the repair changes nothing")
    parts = {name: _decomposed(change, rank) for name, change in changes.items()}
    adapted = add_lora(cut, rank=rank, alpha=float(rank), dropout=0.0, modules=sorted(changes), seed=0)
    left, total = 0.0, 0.0
    with torch.no_grad():
        for name, (up, down, kept) in parts.items():
            module = adapted.base_model.model.get_submodule(name)
            for into, part in ((module.lora_A, down), (module.lora_B, up)):
                weight = into["default"].weight
                weight.zero_()
                weight[tuple(slice(size) for size in part.shape)] = part.to(weight)
            left += kept
            total += float(changes[name].square().sum())
    save_adapter(adapted, folder)
    return min(1.0, left / total)


def _changes(repaired: nn.Module, cut: nn.Module) -> dict[str, Tensor]:
    """By linear module, what its weight (d_out, d_in) gained, in float64."""
    found: dict[str, Tensor] = {}
    old = dict(cut.named_parameters())
    for name, new in repaired.named_parameters():
        change = new.detach().to("cpu", torch.float64) - old[name].detach().to("cpu", torch.float64)
        if not change.any():
            continue
        path, _, kind = name.rpartition(".")
        module = cut.get_submodule(path)
        if kind != "weight" or not is_linear(module):
            raise ModelError(f"--as-adapter: the repair changes {name}, which no LoRA holds. Write the checkpoint")
        found[path] = change if isinstance(module, nn.Linear) else change.T
    return found


def _decomposed(change: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The two factors of the best approximation of ``rank``, and the squares that it keeps."""
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    root = values.sqrt()
    return left * root, root[:, None] * right, float(values.square().sum())
