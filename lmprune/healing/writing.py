"""From trained parameters to a plain checkpoint: merged into unquantised weights, proven, read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lmprune.errors import VerifyError
from lmprune.forward.machine import release
from lmprune.healing.methods.base import Agreement, Method
from lmprune.healing.student import live_where_it_fits, prepare, trained_tensors
from lmprune.models.adapters import attach_adapter, merged, save_adapter
from lmprune.models.cut import Cut
from lmprune.models.loading import load_model
from lmprune.models.saving import save_beside

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest accepted `relative_distance` of merged logits, by the type they are computed in."""
PROBE = 4
"""Held-out blocks on which logits are compared."""


_PROBE_NUMBERS = 1 << 26


def probe_ids(held_out: NDArray[np.int32], vocabulary: int) -> Tensor:
    """The ids (blocks, length) on which logits are compared, so few that these fit beside a model."""
    length = max(1, min(held_out.shape[1], _PROBE_NUMBERS // vocabulary))
    blocks = max(1, min(PROBE, _PROBE_NUMBERS // (vocabulary * length)))
    return torch.from_numpy(held_out[:blocks, :length].astype("int64"))


def relative_distance(ours: Tensor, theirs: Tensor) -> float:
    """RMS difference of logits (..., vocabulary) over the spread of ``theirs``, without means: softmax ignores them."""
    ours, theirs = (logits - logits.mean(-1, keepdim=True) for logits in (ours, theirs))
    apart, spread = (float(logits.square().mean().sqrt()) for logits in (ours - theirs, theirs))
    return apart / spread if spread else (inf if apart else 0.0)


@torch.no_grad()
def probe_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits in float32 on the CPU for token ids (blocks, length)."""
    logits: Tensor = model.eval()(input_ids=ids.to(model.device), use_cache=False).logits
    return logits.float().cpu()


@dataclass(frozen=True)
class Merger:
    """A `lmprune.healing.methods.base.Merging` into the weights of ``cut``.

    Attributes:
        ids: token ids (blocks, length) on which logits are compared.
        adapter: the folder that an adapter is kept in, where the method makes one.
        compute: the type in which it was trained; both sides of the comparison are computed in it.
    """

    cut: Cut
    method: Method
    seed: int
    ids: Tensor
    adapter: Path
    compute: str
    device: str

    def take_adapter(self) -> tuple[nn.Module, Agreement]:
        """The adapter in its folder merged into the weights, and the proof.

        Raises:
            HostError: PEFT found weights that are no numbers.
        """
        model, types = self._widened()
        adapted = attach_adapter(model, str(self.adapter), self.cut.base.path, self.cut.plan)
        wanted = probe_logits(adapted, self.ids)
        model = merged(adapted)
        return model, _round(model, types, self.ids, wanted)

    def take_over(self, student: nn.Module) -> tuple[nn.Module, Agreement]:
        """The weights that ``student`` has changed in place of the cut model's, and the proof."""
        changed = trained_tensors(student)
        new = {name: tensor.detach().cpu() for name, tensor in changed.items()}
        for parameter in changed.values():  # what is frozen is of the type of computation already
            parameter.data = parameter.data.to(getattr(torch, self.compute))
        wanted = probe_logits(student, self.ids)
        model, types = self._widened()
        model, _ = prepare(model, self.method, self.cut.origin.plan, self.seed)
        for name, parameter in trained_tensors(model).items():
            parameter.data = new[name].to(parameter.device, getattr(torch, self.compute))
        return model, _round(model, types, self.ids, wanted)

    def keep(self, student: nn.Module) -> None:
        """Write the adapter of ``student`` into its folder."""
        save_adapter(student, self.adapter)

    def _widened(self) -> tuple[Any, dict[str, torch.dtype]]:
        """The cut model in the type of computation, and the types its weights have as they are stored."""
        dtype = self.cut.recipe.dtype if self.cut.recipe else None
        model = live_where_it_fits(self.cut, dtype=dtype or "auto", device=self.device)
        types = {name: parameter.dtype for name, parameter in model.named_parameters()}
        if any(stored is not getattr(torch, self.compute) for stored in types.values()):
            # Widened weights alone would not do: a buffer such as Gemma's scale of embeddings was rounded too.
            del model
            release()
            model = live_where_it_fits(self.cut, dtype=self.compute, device=self.device)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, self.compute))
        return model, types


def _round(model: Any, types: Mapping[str, torch.dtype], ids: Tensor, wanted: Tensor) -> Agreement:
    """Bring the weights back to ``types``, once; how far they were from ``wanted`` before, and what that changed.

    What rounding does is measured and not judged: an update smaller than a step of the type is lost whoever rounds, and
    the held-out loss of what is written counts it. Computed in no wider type, the two cannot be told apart.
    """
    stored = max(types.values(), key=lambda dtype: torch.finfo(dtype).eps)
    compute = next(model.parameters()).dtype
    apart = compute is torch.float32
    exact = probe_logits(model, ids) if apart else wanted
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(types.get(name, stored)).to(parameter.dtype)
    rounding = relative_distance(probe_logits(model, ids), exact)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(types.get(name, stored))
    model.config.dtype = stored
    if apart:
        return Agreement(relative_distance(exact, wanted), TOLERANCE[compute], rounding)
    return Agreement(rounding, TOLERANCE[stored], rounding)


def write_checkpoint(model: Any, source: Path, ids: Tensor, folder: Path) -> None:
    """Weights, config and the companions of ``source`` as a plain checkpoint, and read it back.

    Raises:
        OutputError: it cannot be written.
        VerifyError: what was read back is not what was written.
    """
    model.config._name_or_path = ""
    save_beside(model, source, folder)
    again = load_model(folder, device=str(model.device))
    if not torch.equal(probe_logits(again, ids), probe_logits(model, ids)):
        raise VerifyError("the written checkpoint gives other logits than the model in memory. Nothing was written")
