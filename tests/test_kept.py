"""States that stay between the steps of a search: the same bits, fewer layers, and no more memory than there is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import tiny_config, tiny_model

from lmprune.cuts.plan import Plan
from lmprune.cuts.sublayers import plan_of
from lmprune.errors import ModelError
from lmprune.forward import loss as module
from lmprune.forward.kept import SHARE
from lmprune.forward.loss import LossTable
from lmprune.forward.tree import passes, paths_of, walk, worth_keeping
from lmprune.forward.views import pruned_view
from lmprune.models.loading import load_model
from lmprune.models.stack import find_stack
from lmprune.text.tokens import Tokens

LAYERS = 8
GONE = (4, 1)
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"head_dim": 12, "sliding_window": 4},
    "gpt2": {"n_embd": 64, "n_layer": LAYERS, "n_head": 4},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    rng = np.random.default_rng(0)
    return Tokens(tuple(rng.integers(4, 60, length).astype(np.int32) for length in (5, 9, 7, 3, 2, 8)))


@pytest.fixture(scope="module")
def llama(tiny: Callable[..., Path]) -> Any:
    return load_model(tiny("llama"), dtype="float32")


def steps() -> list[list[Plan]]:
    """What greedy asks for where the layers of `GONE` go, one after the other."""
    every = [(GONE[:number], layer) for number in range(len(GONE)) for layer in range(LAYERS)]
    asked = [Plan(LAYERS, (*gone, layer)) for gone, layer in every if layer not in gone]
    return [[plan for plan in asked if len(plan.dropped) == count] for count in range(1, len(GONE) + 1)]


def measured(table: LossTable, every: Sequence[Sequence[Plan]]) -> tuple[list[Any], list[int]]:
    """The losses of each step, and the layers that it took, each counted once."""
    found, took = [], []
    for plans in every:
        before = table.passes
        found.append(table.losses(plans).values)
        took.append(round((table.passes - before) * LAYERS / table.samples))
    return found, took


def same(ours: list[Any], theirs: list[Any]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_an_earlier_step_left_changes_no_bit(kind: str, tiny: Callable[..., Path], tokens: Tokens) -> None:
    model = load_model(tiny(kind, **KINDS[kind]))
    ours, took = measured(LossTable(model, tokens, batch_size=4, keep=True, progress=False), steps())
    theirs, alone = measured(LossTable(model, tokens, batch_size=4, share=False, progress=False), steps())
    assert same(ours, theirs)
    # 7 layers that all begin with, and what follows each; then what follows the later of the new gap and the candidate.
    assert alone == [8 * 7, 7 * 6]
    assert took == [7 + 28, 4 * 3 + 3]


def test_layers_of_several_kinds_are_kept(tokens: Tokens) -> None:
    model = tiny_model(tiny_config("jamba")).eval()

    def fits(plan: Plan) -> bool:
        try:
            pruned_view(model, plan)
        except ModelError:
            return False
        return True

    every = [[plan for plan in plans if fits(plan)] for plans in steps()]
    assert all(len(plans) > 1 for plans in every)
    ours, took = measured(LossTable(model, tokens, batch_size=4, keep=True, progress=False), every)
    theirs, shared = measured(LossTable(model, tokens, batch_size=4, progress=False), every)
    assert same(ours, theirs) and took[1] < shared[1]


def test_sublayers_are_kept_too(tiny: Callable[..., Path], tokens: Tokens) -> None:
    model, parts = load_model(tiny("qwen3")), [(layer, name) for layer in range(8) for name in ("attention", "mlp")]
    every = [[plan_of(8, [part]) for part in parts], [plan_of(8, [(5, "mlp"), p]) for p in parts if p != (5, "mlp")]]
    ours, took = measured(LossTable(model, tokens, batch_size=4, keep=True, progress=False), every)
    theirs, shared = measured(LossTable(model, tokens, batch_size=4, progress=False), every)
    assert same(ours, theirs) and took[0] == shared[0] and took[1] < 0.7 * shared[1]


def test_where_layers_hand_on_more_nothing_is_kept(
    tiny: Callable[..., Path], tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    honest = LlamaDecoderLayer.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = honest(self, hidden_states, *args, **kwargs)
        left = self.self_attn.config.__dict__.setdefault("left", {})
        left[self.self_attn.layer_idx] = output.mean()
        return output + left[0]

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    model = load_model(tiny("llama"))
    ours, took = measured(LossTable(model, tokens, batch_size=4, keep=True, progress=False), steps())
    theirs, alone = measured(LossTable(model, tokens, batch_size=4, share=False, progress=False), steps())
    assert same(ours, theirs) and took == alone


def test_less_room_costs_layers_and_no_bit(llama: Any, tokens: Tokens) -> None:
    """``--states`` bounds what stays of each batch; what is not there is computed again."""
    found = {}
    for most in (None, 12, 6, 2, 0):
        table = LossTable(llama, tokens, batch_size=4, keep=True, states=most, progress=False)
        values, took = measured(table, steps())
        found[most] = sum(took[1:]), values
        assert table._held is not None
        kept = table._held._states.values()
        assert most is None or max((len(states) for states in kept), default=0) <= most
    costs = [cost for cost, _ in found.values()]
    assert costs[0] < min(costs[1:]) and max(costs[:-1]) < costs[-1]
    assert all(same(values, found[None][1]) for _, values in found.values())


def test_what_stays_is_a_share_of_the_free_memory(llama: Any, tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    state = 64 * 4 * (4 * 5 + 2 * 9)  # of all batches: of 4 samples of up to 7 tokens, and so on
    monkeypatch.setattr(module, "free_memory", lambda device: free[0])
    free = [SHARE * 5 * state]
    table = LossTable(llama, tokens, batch_size=4, keep=True, progress=False)
    first = table.losses(steps()[0]).values
    assert table._held is not None and 0 < table._held.held <= 5 * state
    free[0], before = 0, table._held.held
    assert same([table.losses(steps()[1]).values], [LossTable(llama, tokens, batch_size=4).losses(steps()[1]).values])
    assert table._held.held <= before // SHARE and np.isfinite(first).all()


def test_short_memory_lets_go_of_what_stays_first(llama: Any, tokens: Tokens) -> None:
    table = LossTable(llama, tokens, batch_size=4, keep=True, progress=False)
    first = steps()[0]
    table.losses(first)
    calls: list[int] = []

    def hungry(module: Any, args: Any, kwargs: Any) -> None:
        calls.append(len(args[0]))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = find_stack(llama).layers[7].register_forward_pre_hook(hungry, with_kwargs=True)
    try:
        assert table._held is not None and table._held.held
        found = table.losses(steps()[1]).values
    finally:
        handle.remove()
    assert table._held.held == 0 and len(calls) > 2 and max(calls) == 4, "the batch is not halved"
    assert np.array_equal(found, LossTable(llama, tokens, batch_size=4, progress=False).losses(steps()[1]).values)


def test_the_states_that_are_worth_most_stay() -> None:
    """Evenly spaced, more of them where more is computed: no other choice of so many would save a later step more."""
    plans = {str(layer): Plan(5, (layer,)) for layer in range(5)}
    turns = walk(paths_of(plans))

    def saved(kept: frozenset[tuple[int, ...]]) -> float:
        """Layers, by the model of `worth_keeping`: of every turn's own, each place as likely as another."""
        total = 0.0
        for turn in turns:
            for place in range(turn.start, len(turn.path)):
                depths = [depth for depth in range(turn.start, place + 1) if turn.path[:depth] in kept]
                total += max(depths, default=turn.start) - turn.start
        return total

    every = [turn.path[:depth] for turn in turns for depth in range(turn.start + 1, len(turn.path))]
    assert worth_keeping(turns, len(every)) == frozenset(every) and worth_keeping(turns, 0) == frozenset()
    for room in (1, 2, 3):
        best = max(saved(frozenset(some)) for some in itertools.combinations(every, room))
        chosen = worth_keeping(turns, room)
        assert len(chosen) == room and saved(chosen) == best


def test_a_walk_starts_from_what_is_known() -> None:
    paths = {"a": (0, 1, 2, 4), "b": (0, 1, 3, 4), "c": (0, 2, 3, 4)}
    turns = walk(paths, known={"b": 3})
    assert [(turn.name, turn.start, turn.known, turn.saves) for turn in turns] == [
        ("a", 0, False, (1,)),
        ("b", 3, True, ()),
        ("c", 1, False, ()),
    ]
    assert passes(turns)[0] == 4 + 1 + 3
