"""What gives the values of batches of rows: a model in memory, or one that is read layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn

from lmprune.errors import LmpruneError, ModelError
from lmprune.forward import streaming
from lmprune.forward.batches import Batch, Row, Rows
from lmprune.forward.calls import decoder_of, evaluating, input_device, run_decoder, watching
from lmprune.forward.machine import Halving
from lmprune.models.cut import Cut
from lmprune.models.stack import find_stack
from lmprune.profiling.statistics import Values, collector


class Measurer(Protocol):
    """A model whose states can be measured."""

    layers: int
    at_once: int
    """Batches that are best measured in one call."""

    def measure(self, batches: Sequence[Rows]) -> list[Values]:
        """The values of each batch's rows, in order."""


class LiveModel:
    """Measures batches of rows on a model that is in memory."""

    def __init__(self, model: nn.Module, token: str, say: Callable[[str], None]) -> None:
        self._model = model
        self._stack = find_stack(model)
        self._decoder = decoder_of(model)
        self.layers = len(self._stack.layers)
        self.at_once = 1
        self._collector = collector(token, self.layers)
        self._halving: Halving[Row, Values] = Halving(self._forward, _hopeless, say)

    def measure(self, batches: Sequence[Rows]) -> list[Values]:
        """The values of each batch's rows, in order.

        Raises:
            ModelError: memory runs out even for a single sample.
        """
        with evaluating(self._model), torch.no_grad():
            return [np.concatenate(self._halving(rows)) for rows in batches]

    def _forward(self, rows: Rows) -> Values:
        batch = Batch.of(rows, input_device(self._decoder))
        self._collector.begin(batch)
        with watching(self._stack.layers, self._collector.take):
            run_decoder(self._decoder, batch)
        return self._collector.values()


def _hopeless(row: Row) -> LmpruneError:
    return ModelError(
        f"out of memory with one sample of {len(row)} tokens. Use --stream, --quantization nf4 or a smaller "
        "--max-length"
    )


class StreamedModel:
    """Measures batches of rows on a model that is read layer by layer; errors as of the stream's."""

    def __init__(self, cut: Cut, token: str, *, dtype: str, device: torch.device, at_once: int) -> None:
        self._model = streaming.StreamedModel(cut, dtype=dtype, device=device)
        self._token, self._device = token, device
        self.layers = self._model.layers
        self.at_once = at_once

    def measure(self, batches: Sequence[Rows]) -> list[Values]:
        """The values of each batch's rows, in order: every layer is read once for all of them."""
        if not batches:
            return []
        on_device = [Batch.of(rows, self._device) for rows in batches]
        collectors = [collector(self._token, self.layers) for _ in batches]
        for each, batch in zip(collectors, on_device, strict=True):
            each.begin(batch)
        self._model.run(on_device, [each.take for each in collectors])
        return [each.values() for each in collectors]
