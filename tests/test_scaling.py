"""Magnitude compensation: what is folded does what multiplying the state at the cut does."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import LAYERS, model_of, student_of

from lmprune.cuts.plan import Plan
from lmprune.errors import DataError, ModelError, UsageError
from lmprune.healing.scaling import compensate, scales_of
from lmprune.models.stack import find_stack

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [np.arange(3, 3 + length, dtype=np.int32) % 90 + 3 for length in (24, 30, 24)]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return torch.cat([model(input_ids=torch.from_numpy(row.astype(np.int64))[None]).logits[0] for row in ROWS])


@torch.no_grad()
def lengths(whole: Any, layer: int) -> float:
    """The mean length of what enters a layer, sample by sample, without padding."""
    found: list[Tensor] = []
    hook = (
        find_stack(whole)
        .layers[layer]
        .register_forward_pre_hook(
            lambda _, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    )
    logits(whole)
    hook.remove()
    return float(torch.cat([state[0] for state in found]).double().norm(dim=-1).mean())


@pytest.mark.parametrize("dropped", [(2, 3), (0, 3), (1, 4)])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("phi", {}),
        ("opt", {}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("granite", {"residual_multiplier": 0.25}),
        ("mixtral", {}),
    ],
)
def test_folded_is_multiplied_at_the_cut(kind: str, more: dict[str, Any], dropped: tuple[int, ...]) -> None:
    whole, plan = model_of(kind, **more), Plan(LAYERS, dropped)
    student = student_of(whole, plan)
    layers, cut = find_stack(student).layers, logits(student)

    scales = compensate(student, whole, plan, ROWS)

    expected = student_of(whole, plan)
    for scale in scales:
        layer, first = plan.kept[scale.place], 0 if scale.place == 0 else plan.kept[scale.place - 1] + 1
        assert scale.alpha == pytest.approx(lengths(whole, layer) / lengths(whole, first), rel=1e-5)
        find_stack(expected).layers[scale.place].register_forward_pre_hook(_times(scale.alpha), with_kwargs=True)
    change = (logits(expected) - cut).norm()
    assert change > 1e-2
    assert (logits(student) - logits(expected)).norm() < 1e-2 * change
    assert len(layers) == LAYERS - len(dropped) == len(find_stack(student).layers)


def _times(alpha: float) -> Any:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (alpha * args[0], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": alpha * kwargs["hidden_states"]}

    return hook


@pytest.mark.parametrize(("kind", "reason"), [("qwen2_moe", "its mlp is no linear map"), ("bloom", "cannot be folded")])
def test_what_cannot_be_folded_is_refused_and_left_as_it_was(kind: str, reason: str) -> None:
    whole, plan = model_of(kind), Plan(LAYERS, (2, 3))
    student = student_of(whole, plan)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ModelError, match=reason):
        compensate(student, whole, plan, ROWS)
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_bad_input_is_one_line() -> None:
    whole = model_of("llama")
    with pytest.raises(UsageError, match="no layer follows a cut"):
        scales_of(whole, Plan(LAYERS, (5,)), ROWS)
    with pytest.raises(DataError, match="there is none"):
        scales_of(whole, Plan(LAYERS, (2,)), [])
