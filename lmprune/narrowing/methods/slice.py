"""Directions of the stream by principal components, as SliceGPT finds them (Ashkboos et al., arXiv 2401.15024).

Where it departs from the paper, so that a stock checkpoint comes out: there is one rotation for the whole model and not
one for each block, since no stock class has room for the maps between two; it is found from all norms' inputs together,
the last norm's weighing a quarter more of the whole, each token at the same length, and not block by block from the
sliced model's own states. Tied embeddings stay tied: the stream is scaled by the square root of the final norm's
weights first, so that one matrix serves as embedding and as head. The paper's deleted directions are the last principal
components, as here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmprune.narrowing.base import Rotation

AXIS = "hidden"
FINAL = 0.25
"""What the last norm's input weighs besides, as a share of all the others: the head reads it."""


def rotation(every: Tensor, last: Tensor, scale: Tensor | None = None) -> Rotation:
    """The principal directions.

    Args:
        every: the mean of x x' of what enters all norms (d, d), each x of one length.
        last: the same of the final norm alone.
        scale: what each channel of the stream is multiplied by before it is turned, (d,); None: nothing.
    """
    total = every + FINAL * last
    if scale is not None:
        total = scale.double()[:, None] * total * scale.double()
    energies, directions = torch.linalg.eigh(total)
    return Rotation(directions.flip(1), energies.flip(0).clamp_min(0))
