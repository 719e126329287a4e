"""Patches that train, and nothing else: the distilled variant of LinearPatch (arXiv 2505.24680)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lmprune.forward.batches import Batch
from lmprune.forward.calls import evaluating
from lmprune.healing.patching import gaps_of
from lmprune.healing.repairing import Repair
from lmprune.models.patches import CHANGE, changes_of, taken_off, trainable_behind
from lmprune.models.stack import find_stack

if TYPE_CHECKING:
    from lmprune.healing.methods.linear_patch import LinearPatch

_LEAST, _DECAY = 1 / 20, 1e-4
"""Of the peak learning rate, what is left at the end; and AdamW's weight decay."""


def distilled(work: Repair, maps: Mapping[str, Tensor], options: LinearPatch) -> dict[str, Tensor]:
    """``maps`` after so many steps, as full matrices; the live student is left without them.

    The blocks come in a random order, all of them before one comes again.
    """
    layers, plan = find_stack(work.student).layers, work.plan
    device = next(work.student.parameters()).device
    starts = changes_of(maps, [gap.after for gap in gaps_of(plan)], "the patch")
    eye = torch.eye(len(next(iter(starts.values()))), device=device)
    # What decays is P, and not P - 1.
    trained = {layer: nn.Parameter(eye + change.to(device)) for layer, change in starts.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=options.patch_lr, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, options.patch_steps, eta_min=options.patch_lr * _LEAST
    )
    order = _order(len(work.calibration), options.patch_steps * options.patch_batch_size)
    work.student.requires_grad_(False)
    places = {layer: layers[plan.kept.index(layer)] for layer in trained}
    with evaluating(work.student), evaluating(work.whole):
        for layer, module in places.items():
            trainable_behind(module, partial(_change, trained[layer], eye))
        try:
            for step in tqdm(range(options.patch_steps), desc="distilling", disable=None, leave=False):
                rows = order[step * options.patch_batch_size : (step + 1) * options.patch_batch_size]
                batch = Batch.of([np.asarray(work.calibration[row]) for row in rows], device)
                optimizer.zero_grad()
                loss = divergence(work.whole, work.student, batch, options.patch_top_k)
                loss.backward()
                optimizer.step()
                schedule.step()
        finally:
            for module in places.values():
                taken_off(module)
    return {f"{layer}.{CHANGE}": (matrix.detach() - eye).cpu() for layer, matrix in trained.items()}


def _change(patch: Tensor, eye: Tensor) -> Tensor:
    return patch - eye


def divergence(whole: Any, student: Any, batch: Batch, top_k: int) -> Tensor:
    """KL of the whole model's ``top_k`` likeliest tokens to the student's, both normalised over these, a mean."""
    asked = {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False}
    with torch.no_grad():
        logits = batch.real(whole(**asked).logits).float()
        likeliest, tokens = logits.topk(min(top_k, logits.shape[-1]))
    ours = batch.real(student(**asked).logits).float().gather(-1, tokens).log_softmax(-1)
    return nn.functional.kl_div(ours, likeliest.log_softmax(-1), reduction="batchmean", log_target=True)


def _order(blocks: int, wanted: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    while len(order) < wanted:
        order += torch.randperm(blocks, generator=generator).tolist()
    return order[:wanted]
