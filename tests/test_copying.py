"""Our own writer: byte-exact, streamed, sharded as its source, and complete."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import IRREGULAR, batch, tiny_config, tiny_model
from safetensors.torch import load_file, save_file

from lmprune.cuts.plan import Plan
from lmprune.errors import ModelError
from lmprune.models.checkpoint import INDEX, Checkpoint
from lmprune.models.cut import Cut, open_cut
from lmprune.models.loading import load_model
from lmprune.writing.copying import copy_checkpoint, copy_companions

PLAN = Plan.from_kept(8, IRREGULAR)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    tiny_model(tiny_config("llama")).to(torch.bfloat16).save_pretrained(tmp_path / "single")
    return tmp_path / "single"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_model(tiny_config("llama")).save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    return tmp_path / "sharded"


def _cut(folder: Path, plan: Plan = PLAN) -> Cut:
    return open_cut(folder).without(plan, "a cut")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=batch()).logits


def test_a_single_file_is_copied_byte_for_byte(single: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    copy_checkpoint(_cut(single), out)
    old, new = load_file(single / "model.safetensors"), load_file(out / "model.safetensors")
    assert not (out / INDEX).exists()
    for name, tensor in new.items():
        parts = name.split(".")
        if "layers" in parts:
            parts[2] = str(PLAN.kept[int(parts[2])])
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, old[".".join(parts)])
    assert len(new) == len(old) - 9 * len(PLAN.dropped)


def test_shards_stay_shards(sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    copy_checkpoint(_cut(sharded), out)
    index = json.loads((out / INDEX).read_text())
    written = Checkpoint.open(out)
    assert set(index["weight_map"]) == set(written.tensors)
    assert index["metadata"]["total_size"] == written.bytes
    shards = sorted(out.glob("*.safetensors"))
    assert [shard.name for shard in shards] == sorted(set(index["weight_map"].values()))
    assert all(f"-of-{len(shards):05d}" in shard.name for shard in shards)
    assert torch.equal(logits(load_model(out)), logits(load_model(sharded, plan=PLAN)))


def test_every_type_is_kept_as_it_is(single: Path, tmp_path: Path) -> None:
    tensors = load_file(single / "model.safetensors")
    tensors["model.layers.6.mlp.up_proj.weight_scale_inv"] = torch.ones(3, dtype=torch.float64)
    tensors["model.layers.7.mlp.up_proj.weight"] = tensors["model.layers.7.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, single / "model.safetensors", {"format": "pt"})
    copy_checkpoint(_cut(single), tmp_path / "out")
    new = Checkpoint.open(tmp_path / "out").tensors
    assert new["model.layers.3.mlp.up_proj.weight_scale_inv"].dtype == "F64"
    assert new["model.layers.4.mlp.up_proj.weight"].dtype == "F8_E4M3"


def test_companions_come_along_and_code_only_when_trusted(single: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "modeling_x.py", "training_args.bin"):
        (single / name).write_text("{}")
    (single / "additional_chat_templates").mkdir()
    (single / "additional_chat_templates" / "tool.jinja").write_text("x")
    out = tmp_path / "out"
    copy_checkpoint(_cut(single), out)
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {"tokenizer.json", "chat_template.jinja", "LICENSE", "generation_config.json"} <= names
    assert "additional_chat_templates/tool.jinja" in names
    assert not {"modeling_x.py", "training_args.bin"} & names
    assert "modeling_x.py" in copy_companions(single, tmp_path / "trusted", code=True)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    config = tiny_config("llama", hidden_size=1024, intermediate_size=4096, num_attention_heads=4)
    tiny_model(config).save_pretrained(tmp_path / "big")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    copy_checkpoint(_cut(tmp_path / "big"), tmp_path / "out")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "kilobytes"


@pytest.mark.parametrize("damage", ["truncated", "missing shard", "index", "config", "pickle"])
def test_bad_sources_are_refused_in_one_line(damage: str, sharded: Path, tmp_path: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-5])
    elif damage == "missing shard":
        shard.unlink()
    elif damage == "index":
        index = json.loads((sharded / INDEX).read_text())
        index["weight_map"]["model.layers.0.extra.weight"] = shard.name
        (sharded / INDEX).write_text(json.dumps(index))
    elif damage == "config":
        config = json.loads((sharded / "config.json").read_text())
        (sharded / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 12}))
    else:
        for file in [*sharded.glob("*.safetensors"), sharded / INDEX]:
            file.unlink()
        (sharded / "pytorch_model.bin").write_bytes(b"x")
    plan = Plan(12, (3,)) if damage == "config" else PLAN
    with pytest.raises(ModelError) as raised:
        copy_checkpoint(_cut(sharded, plan), tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
