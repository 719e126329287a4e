"""Each criterion keeps its promise: one row per criterion, and the claim of its method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmprune.criteria import CRITERIA


@pytest.fixture(scope="module")
def with_identity(tiny: Callable[..., Path]) -> tuple[Any, Any]:
    """A random 8-layer Llama whose layer 3 passes its input on unchanged, and its profile."""
    import torch

    from lmprune.models.loading import load_model
    from lmprune.profiling import ProfileSettings, profile
    from lmprune.text.tokens import Tokens

    model = load_model(tiny("llama"), dtype="float32")
    with torch.no_grad():
        model.model.layers[3].self_attn.o_proj.weight.zero_()
        model.model.layers[3].mlp.down_proj.weight.zero_()
    ids = torch.randint(2, 300, (6, 20), generator=torch.Generator().manual_seed(0))
    return model, profile(model, Tokens.from_padded(ids), ProfileSettings(samples=6, max_length=20))


# criterion, layers to drop, the layers that it must drop on a model whose layer 3 is the identity
CLAIMS = [("angular", 1, (3,)), ("deepest", 2, (5, 6))]


def test_every_criterion_has_a_row() -> None:
    assert {name for name, _, _ in CLAIMS} == set(CRITERIA)


@pytest.mark.parametrize(("name", "count", "dropped"), CLAIMS)
def test_claims(name: str, count: int, dropped: tuple[int, ...], with_identity: tuple[Any, Any]) -> None:
    assert CRITERIA[name].choose(8, count, with_identity[1]).dropped == dropped


@pytest.mark.parametrize("name", CRITERIA)
def test_every_size_can_be_chosen(name: str, with_identity: tuple[Any, Any]) -> None:
    for count in range(1, 8):
        plan = CRITERIA[name].choose(8, count, with_identity[1])
        assert len(plan.dropped) == count and plan.layers == 8
