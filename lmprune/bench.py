"""Speed of models side by side: measured in turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any


def prefill_speed(
    models: Sequence[Any], *, batch: int = 8, length: int = 256, runs: int = 10, warm: int = 2
) -> list[float]:
    """Median tokens per second of a forward pass over (batch, length) tokens, for each model.

    The models take turns; the first ``warm`` rounds are discarded.
    """
    import torch

    times: list[list[float]] = [[] for _ in models]
    for round_ in range(warm + runs):
        for i, model in enumerate(models):
            ids = torch.arange(batch * length).view(batch, length) % model.config.get_text_config().vocab_size
            ids = ids.to(model.device)
            began = time.perf_counter()
            with torch.inference_mode():
                logits = model(input_ids=ids).logits
            float(logits[0, 0, 0])  # waits for the device
            if round_ >= warm:
                times[i].append(time.perf_counter() - began)
    return [batch * length / statistics.median(values) for values in times]
