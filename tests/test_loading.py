"""Loading whole and partial models: the right weights, only those bytes, and one line when something is off."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import IRREGULAR, batch, tiny_config, tiny_model
from safetensors.torch import load_file, save_file

from lmprune.cuts.plan import Plan
from lmprune.errors import ModelError, UsageError
from lmprune.forward.calls import skipping
from lmprune.models.checkpoint import Checkpoint
from lmprune.models.loading import load_config, load_model, load_tokenizer

PLAN = Plan.from_kept(8, IRREGULAR)


def save(folder: Path, kind: str = "llama", *, shards: str = "5GB", dtype: Any = torch.float32, **config: Any) -> Path:
    tiny_model(tiny_config(kind, **config)).to(dtype).save_pretrained(folder, max_shard_size=shards)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=batch()).logits.float()


@pytest.mark.parametrize("shards", ["5GB", "40KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_partial_model_equals_the_whole_with_layers_skipped(shards: str, tied: bool, tmp_path: Path) -> None:
    folder = save(tmp_path, shards=shards, tie_word_embeddings=tied)
    whole, part = load_model(folder), load_model(folder, plan=PLAN)
    with skipping(whole, PLAN.dropped):
        assert torch.equal(logits(part), logits(whole))
    assert not part.training
    assert part.config.num_hidden_layers == 5
    assert (part.lm_head.weight is part.model.embed_tokens.weight) == tied


def test_only_kept_tensors_are_read(tmp_path: Path) -> None:
    folder = save(tmp_path)
    for entry in Checkpoint.open(folder).tensors.items():
        name, place = entry
        if any(name.startswith(f"model.layers.{layer}.") for layer in PLAN.dropped):
            with place.file.open("r+b") as file:  # NaN wherever nobody should look
                file.seek(place.start)
                file.write(b"\xff" * (place.stop - place.start))
    assert torch.isfinite(logits(load_model(folder, plan=PLAN))).all()


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_the_stored_type_is_kept(stored: str, tmp_path: Path) -> None:
    folder = save(tmp_path, dtype=getattr(torch, stored))
    assert str(load_model(folder, plan=PLAN).dtype) == f"torch.{stored}"
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    assert str(load_model(folder, plan=PLAN).dtype) == f"torch.{stored}"
    assert load_model(folder, dtype="float32").dtype == torch.float32
    with pytest.raises(UsageError, match="--dtype 'bf16' does not exist"):
        load_model(folder, dtype="bf16")


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_loading(quantization: Any, tmp_path: Path) -> None:
    folder = save(tmp_path, hidden_size=128, intermediate_size=256, head_dim=32, dtype=torch.bfloat16)
    part = load_model(folder, plan=PLAN, quantization=quantization)
    assert type(part.model.layers[4].mlp.up_proj).__name__ in ("Linear4bit", "Linear8bitLt")
    full = logits(load_model(folder, plan=PLAN))
    similarity = torch.nn.functional.cosine_similarity(logits(part).flatten(), full.flatten(), dim=0)
    assert similarity > 0.9


def test_generation_settings_come_along(tmp_path: Path) -> None:
    folder = save(tmp_path)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [2, 7], "top_k": 13}))
    model = load_model(folder, plan=PLAN)
    assert (model.generation_config.eos_token_id, model.generation_config.top_k) == ([2, 7], 13)


def test_the_text_part_of_a_multimodal_model(tmp_path: Path) -> None:
    folder = save(tmp_path, "gemma3")
    whole, part = load_model(folder), load_model(folder, plan=PLAN)
    with skipping(whole, PLAN.dropped):
        assert torch.equal(logits(part), logits(whole))
    assert part.config.text_config.num_hidden_layers == 5


@pytest.mark.parametrize("what", ["missing", "unexpected", "shape"])
def test_tensors_that_do_not_fit_are_refused(what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    if what == "missing":
        del tensors["model.layers.6.mlp.up_proj.weight"]
    elif what == "unexpected":
        tensors["model.layers.6.mlp.extra.weight"] = torch.ones(2)
    else:
        tensors["model.layers.6.mlp.up_proj.weight"] = torch.ones(3, 3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    before = logger.level
    try:
        logger.setLevel(logging.WARNING)
        with pytest.raises(ModelError) as raised:
            load_model(folder, plan=PLAN)
        assert logger.level == logging.WARNING
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(before)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)
    assert caplog.text == "", "the host's own report, of many lines"


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(save(tmp_path))


def test_unknown_models_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model", "num_hidden_layers": 2}')
    with pytest.raises(ModelError, match="no_such_model") as raised:
        load_config(tmp_path)
    assert "\n" not in str(raised.value)


def test_custom_code_is_not_run_unasked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Own"}}')
    (tmp_path / "configuration_own.py").write_text("raise SystemExit('custom code ran')")
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_config(tmp_path)
