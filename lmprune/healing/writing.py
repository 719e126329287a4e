"""From trained parameters to a plain checkpoint: merged into unquantised weights, proven, read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmprune.errors import HostError, VerifyError
from lmprune.healing.memory import load_where_it_fits
from lmprune.healing.methods import prepare, trained_tensors
from lmprune.healing.settings import Resolved
from lmprune.healing.sources import Source
from lmprune.models.companions import copy_companions
from lmprune.models.loading import load_model

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest accepted `relative_distance` of merged logits, by the type of the weights: what one rounding may change."""
PROBE = 4
"""Held-out blocks on which logits are compared."""


@dataclass(frozen=True)
class Agreement:
    """How far the written model's logits are from those of the model that was trained."""

    relative_distance: float
    tolerance: float

    def require(self) -> None:
        """Raise a disagreement.

        Raises:
            VerifyError: the distance is beyond the tolerance.
        """
        if not self.relative_distance <= self.tolerance:
            raise VerifyError(
                f"the merged weights do not do what was trained: logits differ by {self.relative_distance:.2g} of "
                f"their spread, and {self.tolerance:.2g} is allowed. Nothing was written; the checkpoints are kept"
            )


def relative_distance(ours: Tensor, theirs: Tensor) -> float:
    """RMS difference of logits (..., vocabulary) over the spread of ``theirs``, without means: softmax ignores them."""
    ours, theirs = (logits - logits.mean(-1, keepdim=True) for logits in (ours, theirs))
    return float((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt())


@torch.no_grad()
def probe_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits in float32 on the CPU for token ids (blocks, length)."""
    logits: Tensor = model.eval()(input_ids=ids.to(model.device), use_cache=False).logits
    return logits.float().cpu()


def merge_adapter(
    source: Source, adapter: Path, ids: Tensor, *, dtype: str, compute: str, device: str
) -> tuple[Any, Agreement]:
    """The source model, unquantised, with the adapter merged into it and in its own type; and the proof.

    Raises:
        HostError: PEFT found weights that are no numbers.
    """
    from peft import PeftModel

    model, types = _widened(load_where_it_fits(source.folder, source.plan, dtype=dtype, device=device), compute)
    adapted = PeftModel.from_pretrained(model, str(adapter))
    wanted = probe_logits(adapted, ids)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as exc:
        raise HostError(f"PEFT cannot merge the adapter: {exc}") from exc
    return merged, _round(merged, types, ids, wanted)


def merge_weights(
    source: Source, trained: Any, settings: Resolved, ids: Tensor, *, dtype: str, compute: str, device: str
) -> tuple[Any, Agreement]:
    """The source model in its own type with the trained weights in place of its own; and the proof."""
    wanted = probe_logits(trained, ids)
    model, types = _widened(load_where_it_fits(source.folder, source.plan, dtype=dtype, device=device), compute)
    model, _ = prepare(model, settings, source.cut)
    new = trained_tensors(trained)
    for name, parameter in trained_tensors(model).items():
        parameter.data = new[name].detach().to(parameter.device, getattr(torch, compute))
    return model, _round(model, types, ids, wanted)


def _widened(model: Any, compute: str) -> tuple[Any, dict[str, torch.dtype]]:
    """``model`` with its weights in the type of computation, and the types they had. Buffers stay as they are."""
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, compute))
    return model, types


def _round(model: Any, types: Mapping[str, torch.dtype], ids: Tensor, wanted: Tensor) -> Agreement:
    """Bring the weights back to ``types``, once, and tell what that changed, computed as ``wanted`` was."""
    stored = max(types.values(), key=lambda dtype: torch.finfo(dtype).eps)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(types.get(name, stored)).to(parameter.dtype)
    found = relative_distance(probe_logits(model, ids), wanted)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(types.get(name, stored))
    model.config.dtype = stored
    return Agreement(found, TOLERANCE[stored])


def write_checkpoint(model: Any, source: Source, ids: Tensor, folder: Path) -> None:
    """Weights, config and tokenizer as a plain checkpoint, and read it back.

    Raises:
        VerifyError: what was read back is not what was written.
    """
    model.config._name_or_path = ""
    model.save_pretrained(folder)
    copy_companions(source.folder, folder)
    again = load_model(folder, device=str(model.device))
    if not torch.equal(probe_logits(again, ids), probe_logits(model, ids)):
        raise VerifyError("the written checkpoint gives other logits than the model in memory. Nothing was written")
