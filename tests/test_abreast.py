"""Several cuts in one pass: what each loses alone but for rounding, in as many layers and as little memory as asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_kept import KINDS, LAYERS, measured, steps
from torch import nn

from lmprune.forward.abreast import Abreast, repeated, same
from lmprune.forward.calls import computing
from lmprune.forward.loss import LossTable
from lmprune.models.loading import load_model
from lmprune.models.stack import find_stack
from lmprune.text.tokens import Tokens

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    rng = np.random.default_rng(0)
    return Tokens(tuple(rng.integers(4, 60, length).astype(np.int32) for length in (5, 9, 7, 3, 2, 8)))


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """How many samples each call of a layer of any view has, as it comes."""
    layer, sizes = type(find_stack(model).layers[0]), list[int]()
    honest = layer.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(hidden_states))
        return honest(self, hidden_states, *args, **kwargs)

    layer.forward = forward  # type: ignore[method-assign]
    try:
        yield sizes
    finally:
        layer.forward = honest  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("kind", "abreast", "keep"), [*((kind, 3, True) for kind in (*KINDS, "mixtral")), ("llama", 50, False)]
)
def test_side_by_side_is_what_each_is_alone(
    kind: str, abreast: int, keep: bool, tiny: Callable[..., Path], tokens: Tokens
) -> None:
    model = load_model(tiny(kind, **KINDS.get(kind, {})), dtype="float32")
    theirs, alone = measured(LossTable(model, tokens, batch_size=4, keep=keep, progress=False), steps())
    with counted(model) as sizes:
        ours, took = measured(
            LossTable(model, tokens, batch_size=4, keep=keep, abreast=abreast, progress=False), steps()
        )
    for found, wanted in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6)
    assert max(sizes) == 4 * min(abreast, LAYERS - 1)
    assert sum(alone) <= sum(took) < 1.35 * sum(alone)  # what leads to the next cuts is computed once


def test_fewer_and_larger_calls(tiny: Callable[..., Path], tokens: Tokens) -> None:
    model, calls = load_model(tiny("llama"), dtype="float32"), {}
    for abreast in (1, 8):
        with counted(model) as sizes:
            LossTable(model, tokens, batch_size=6, abreast=abreast, progress=False).losses(steps()[0])
        calls[abreast] = sizes
    # The triangle of 8 cuts takes 7 + 28 layers one by one; side by side, layer l runs on l + 1 beginnings.
    assert calls[1].count(6) == 7 + 28
    assert calls[8][-LAYERS:] == [6 * wide for wide in (*range(1, LAYERS), LAYERS - 1)]


def test_a_cut_with_sublayers_goes_by_itself(tiny: Callable[..., Path], tokens: Tokens) -> None:
    from lmprune.cuts.sublayers import plan_of

    model = load_model(tiny("llama"), dtype="float32")
    plans = [*steps()[0][:3], plan_of(LAYERS, [(4, "mlp")])]
    with counted(model) as sizes:
        ours = LossTable(model, tokens, batch_size=6, abreast=8, progress=False).losses(plans)
    theirs = LossTable(model, tokens, progress=False).losses(plans)
    np.testing.assert_allclose(ours.values, theirs.values, rtol=2e-5, atol=1e-6)
    assert max(sizes) == 18, "the others run at once all the same"


@pytest.mark.parametrize("abreast", [2, 8])  # by two, the first two part behind all layers that could tell
def test_where_a_layer_looks_at_other_samples_cuts_go_one_by_one(
    abreast: int, tiny: Callable[..., Path], tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    honest = LlamaDecoderLayer.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = honest(self, hidden_states, *args, **kwargs)
        return output + output.mean()

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    model = load_model(tiny("llama"), dtype="float32")
    ours = LossTable(model, tokens, abreast=abreast, progress=False).losses(steps()[0])
    assert np.array_equal(ours.values, LossTable(model, tokens, progress=False).losses(steps()[0]).values)


def test_a_batch_that_only_goes_alone_ends_it(tiny: Callable[..., Path], tokens: Tokens) -> None:
    """As where a table of a model happens to have as many rows as the batch has samples."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model, honest = load_model(tiny("llama"), dtype="float32"), LlamaDecoderLayer.forward
    wanted = LossTable(model, tokens, progress=False).losses(steps()[0])

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        table = torch.zeros(6, 1, 1)[: len(hidden_states)] if len(hidden_states) > 14 else 0  # the proof has up to 14
        return honest(self, hidden_states + table, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaDecoderLayer, "forward", forward)
        found = LossTable(model, tokens, batch_size=6, abreast=8, progress=False).losses(steps()[0])
    assert np.array_equal(found.values, wanted.values)


def test_memory_that_runs_out_ends_it(
    tiny: Callable[..., Path], tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny("llama"), dtype="float32")
    wanted = LossTable(model, tokens, progress=False).losses(steps()[0])
    honest = torch.cat

    def cat(parts: Any, *args: Any, **kwargs: Any) -> Any:
        if len(parts) > 3 and len(parts[0]) > 2:  # the proof has two samples
            raise torch.OutOfMemoryError("out of memory")
        return honest(parts, *args, **kwargs)

    monkeypatch.setattr("lmprune.forward.abreast.torch.cat", cat)
    found = LossTable(model, tokens, batch_size=6, abreast=8, progress=False).losses(steps()[0])
    assert np.array_equal(found.values, wanted.values)


def test_states_are_gone_once_they_are_used() -> None:
    """Over layers that add powers of two: each end is the sum of its own, and nothing else is left."""

    class Layer(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states + 2**self.number

    layers = {number: Layer(number) for number in range(4)}
    paths = [(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)]
    states = Abreast(paths, {(0,): torch.ones(1, 1, 1)}, keep=[(0, 1)])
    hidden = torch.zeros(1, 1, 1)
    with states.over(layers):
        for layer in layers.values():
            hidden = layer(hidden)
    assert {prefix: int(state) for prefix, state in states.states.items()} == {
        (0, 1): 3, (0, 1, 2): 7, (0, 1, 3): 11, (0, 2, 3): 13, (1, 2, 3): 14
    }  # fmt: skip
    assert states.ran == 8 and "forward" not in layers[0].__dict__


def test_what_has_a_row_for_each_sample_is_repeated() -> None:
    mask, angles, one, line = torch.zeros(2, 1, 3, 3), torch.zeros(2, 3, 4), torch.zeros(1, 3), torch.arange(2)
    args, kwargs = repeated(((angles, angles), 5), 2, 3), repeated({"mask": mask, "ids": one, "at": line}, 2, 3)
    assert [len(part) for part in args[0]] == [6, 6] and args[1] == 5
    assert [len(kwargs[name]) for name in ("mask", "ids", "at")] == [6, 1, 2]
    assert len(repeated(torch.zeros(1, 3, 4), 1, 3)) == 1


def test_the_same_but_for_rounding() -> None:
    wanted = torch.tensor([1.0, -8.0])
    assert same(wanted + 8e-6, wanted) and not same(wanted + 1e-3, wanted)
    assert same(wanted.bfloat16() + 0.06, wanted.bfloat16()) and not same(torch.tensor([1.0, 8.0]), wanted)


def test_a_layer_is_as_before_afterwards() -> None:
    layer = nn.Linear(1, 1)
    with computing(layer, lambda honest, args, kwargs: honest(*args) * 0 + 3):
        assert layer(torch.ones(1)).item() == 3
    assert "forward" not in layer.__dict__
