"""Every causal language model of transformers that `prune` supports, streamed: the bits of the pass in memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import MEMORY, tiny_config, tiny_model

from lmprune.errors import ModelError
from lmprune.forward.batches import Rows
from lmprune.models.cut import open_cut
from lmprune.models.loading import load_model
from lmprune.profiling.measuring import LiveModel, StreamedModel
from lmprune.writing import support

SUPPORTED = [row.architecture for row in support.rows() if row.prune in ("right", "some")]
REFUSED: dict[str, str] = {
    **dict.fromkeys(("deepseek_v4", "hy_v4"), r"a state of shape \[4, 12, 4, 32\] for 4 samples of 12 tokens"),
    "cpmant": r"a state of shape \[4, 44, 32\] for 4 samples of 12 tokens",
    "mllama": r"runs layer 1 never and not once",
    "xlnet": r"a state of shape \[12, 4, 32\] for 4 samples of 12 tokens",
}
"""Types that cannot be profiled, streamed or in memory, and what is said: several states for a token, 32 tokens of
its own before those of a sample, layers for pictures that text passes by, tokens before samples."""
FEW = ("gemma4_text", "jamba", "zamba2")
"""Types whose layers share something, for the default run: what the stack prepares, kinds of layers, weights."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4-shared-keys": ("gemma4_text", {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}),
    "gemma4-inputs-of-layers": ("gemma4_text", {"hidden_size_per_layer_input": 8}),
    "sparse-attention-shared": ("glm_moe_dsa", {"indexer_types": ["full", "shared", "shared", "full"] * 2}),
    "rotary-that-grows": (
        "llama",
        {
            "max_position_embeddings": 8,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        },
    ),
}
"""Configs in which passes need more of one another, or of the batch before, than in the tiny ones."""


def rows() -> Rows:
    """Four samples of 12, 9, 12 and 7 tokens."""
    rng = np.random.default_rng(0)
    return [rng.integers(4, 90, length).astype(np.int32) for length in (12, 9, 12, 7)]


pytestmark = pytest.mark.usefixtures("one_thread")


LAST_DIGIT = dict.fromkeys(("granitemoe_swa", "granitemoeshared", "jetmoe", "minimax_m3_vl_text"), 4e-7)
"""With experts, whose products are of few rows, the last digit of a float32 may differ on some processors: here of
values up to 4."""


def compare(kind: str, **changes: Any) -> None:
    """The values of both passes, in both token modes, for a batch of four and two of two, the shortest first."""
    batches = [rows()[1::2], rows(), rows()[::2]]
    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        folder = Path(scratch)
        tiny_model(tiny_config(kind, **changes)).save_pretrained(folder)
        for token in ("last", "all"):
            # a model of its own, since some rotary tables depend on what was read before
            kept = LiveModel(load_model(folder), token, print).measure(batches)
            streamed = StreamedModel(open_cut(folder), token, dtype="auto", device=torch.device("cpu"), at_once=3)
            for one, other in zip(kept, streamed.measure(batches)):
                assert np.isfinite(one).all() and np.abs(one - other).max() <= LAST_DIGIT.get(kind, 0), token


@pytest.mark.parametrize("kind", FEW)
def test_layers_of_many_kinds_give_the_same_bits(kind: str) -> None:
    compare(kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in SUPPORTED if kind not in FEW and kind not in REFUSED])
def test_every_architecture_gives_the_same_bits(kind: str) -> None:
    compare(kind)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(VARIANTS))
def test_layers_that_need_one_another_give_the_same_bits(name: str) -> None:
    kind, changes = VARIANTS[name]
    compare(kind, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(REFUSED))
def test_what_is_refused_is_refused_in_both_ways(kind: str) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        folder = Path(scratch)
        tiny_model(tiny_config(kind)).save_pretrained(folder)
        with pytest.raises(ModelError, match=REFUSED[kind]):
            LiveModel(load_model(folder), "last", print).measure([rows()])
        with pytest.raises(ModelError, match=REFUSED[kind]):
            StreamedModel(open_cut(folder), "last", dtype="auto", device=torch.device("cpu"), at_once=1).measure(
                [rows()]
            )
