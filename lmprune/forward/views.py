"""Several pruned models of one loaded model."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from lmprune.cuts.plan import Plan
from lmprune.models.carrying import cut_live


def pruned_view(model: nn.Module, plan: Plan | None) -> Any:
    """A model of its own modules and config, and of ``model``'s tensors, without the layers that ``plan`` drops."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    view = copy.deepcopy(model, tensors)
    if plan is not None:
        cut_live(view, plan)
    return view
