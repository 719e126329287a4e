"""The decoder stack of live models: found, skipped without a trace, and dropped for good."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import IRREGULAR, batch, tiny_config, tiny_model

from lmprune.cuts.plan import Plan
from lmprune.errors import ModelError
from lmprune.forward.calls import skipping
from lmprune.models.stack import drop_layers, find_stack

PLAN = Plan.from_kept(8, IRREGULAR)


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=batch()).logits


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("llama", "model.layers"),
        ("gpt2", "transformer.h"),
        ("opt", "model.decoder.layers"),
        ("mpt", "transformer.blocks"),
        ("bart", "model.decoder.layers"),
        ("bert", "bert.encoder.layer"),
        ("gemma3", "model.language_model.layers"),
    ],
)
def test_the_stack_is_found(kind: str, path: str) -> None:
    stack = find_stack(tiny_model(tiny_config(kind)))
    assert stack.path == path
    assert getattr(stack.owner, stack.name) is stack.layers
    assert len(stack.layers) == 8


def test_an_ambiguous_stack_is_refused() -> None:
    with pytest.raises(ModelError, match="several lists of that length"):
        find_stack(tiny_model(tiny_config("xlm")))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_next"])
def test_skipping_leaves_no_trace(kind: str) -> None:
    model = tiny_model(tiny_config(kind))
    before, config = logits(model), model.config.to_dict()
    with skipping(model, PLAN.dropped):
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config


def test_skipping_nothing_changes_nothing() -> None:
    model = tiny_model(tiny_config("llama"))
    before = logits(model)
    with skipping(model, ()):
        assert torch.equal(logits(model), before)


def test_a_skipped_layer_is_restored_after_an_error() -> None:
    model = tiny_model(tiny_config("llama"))
    before = logits(model)
    with pytest.raises(ZeroDivisionError), skipping(model, (3,)):
        raise ZeroDivisionError
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt_oss", "qwen3_next", "mllama", "longcat_flash"])
def test_dropping_equals_skipping_and_tells_every_part(kind: str) -> None:
    model = tiny_model(tiny_config(kind))
    with skipping(model, PLAN.dropped):
        wanted = logits(model)
    drop_layers(model, PLAN)
    assert torch.allclose(logits(model), wanted, atol=1e-6)
    text = model.config.get_text_config()
    stack = find_stack(model)
    assert len(stack.layers) == len(PLAN.kept)
    assert text.num_hidden_layers in (len(PLAN.kept), 2 * len(PLAN.kept))
    for place, layer in enumerate(stack.layers):
        places = {m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")}
        assert places <= {place, 2 * place, 2 * place + 1}


def test_dropping_twice_counts_from_the_smaller_model() -> None:
    model = tiny_model(tiny_config("llama"))
    with skipping(model, (3, 4, 5, 6)):
        wanted = logits(model)
    drop_layers(model, PLAN)
    drop_layers(model, Plan(5, (3,)))
    assert torch.equal(logits(model), wanted)


def test_a_refused_drop_changes_nothing() -> None:
    model = tiny_model(tiny_config("diffllama"))
    before = logits(model)
    with pytest.raises(ModelError, match="would change its place"):
        drop_layers(model, PLAN)
    assert torch.equal(logits(model), before)
    assert model.config.num_hidden_layers == 8


def test_the_cache_of_an_earlier_generation_does_not_survive() -> None:
    model = tiny_model(tiny_config("llama"))
    asked = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(batch(), cache_implementation="static", **asked)
    drop_layers(model, PLAN)
    cached = model.generate(batch(), cache_implementation="static", **asked)
    assert torch.equal(cached, model.generate(batch(), use_cache=False, **asked))


def test_an_adapter_around_the_model() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_model(tiny_config("llama")), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    model.eval()
    assert find_stack(model).path == "model.layers"
    with skipping(model, PLAN.dropped):
        wanted = logits(model)
    drop_layers(model, PLAN)
    assert torch.equal(logits(model), wanted)
