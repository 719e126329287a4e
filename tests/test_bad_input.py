"""Broken models and broken recipes on the command line: one line, exit code 1, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_cli import invoke

from lmprune.models.checkpoint import INDEX
from lmprune.models.loading import load_model


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    return lambda *words: invoke(capsys, monkeypatch, *words)


@pytest.fixture
def base(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A sharded model that may be broken."""
    folder = tmp_path / "base"
    shutil.copytree(tiny("llama"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    load_model(tiny("llama")).save_pretrained(folder, max_shard_size="200KB")
    assert (folder / INDEX).is_file()
    return folder


def refused(call: Any, says: str, tmp_path: Path, *words: object) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call(*words)
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith("lmprune: ") and says in err, err
    assert sorted(tmp_path.rglob("*")) == before


def truncate(base: Path) -> str:
    shard = sorted(base.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    return "corrupt or truncated"


def garble(base: Path) -> str:
    shard = sorted(base.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:8] + b"?" * (shard.stat().st_size - 8))
    return "is corrupt"


def lose_a_shard(base: Path) -> str:
    shard = sorted(base.glob("*.safetensors"))[1]
    shard.unlink()
    return f"lacks the shard {shard.name!r}"


def name_an_absent_tensor(base: Path) -> str:
    index = json.loads((base / INDEX).read_text())
    index["weight_map"]["model.layers.0.extra.weight"] = sorted(index["weight_map"].values())[0]
    (base / INDEX).write_text(json.dumps(index))
    return "names 'model.layers.0.extra.weight', which no shard holds"


def promise_more_layers(base: Path) -> str:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
    return "promises 9 layers"


def promise_another_width(base: Path) -> str:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    return "does not fit its config"


def lose_a_tensor(base: Path) -> str:
    shard = next(file for file in base.glob("*.safetensors") if "model.layers.7.mlp.up_proj.weight" in load_file(file))
    tensors = load_file(shard)
    del tensors["model.layers.7.mlp.up_proj.weight"]
    tensors["model.layers.7.other.weight"] = torch.ones(2)
    save_file(tensors, shard, {"format": "pt"})
    return "which no shard holds"


DAMAGES = [
    truncate,
    garble,
    lose_a_shard,
    name_an_absent_tensor,
    promise_more_layers,
    promise_another_width,
    lose_a_tensor,
]


@pytest.mark.parametrize("writer", ["auto", "copy"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_models(damage: Callable[[Path], str], writer: str, base: Path, call: Any, tmp_path: Path) -> None:
    says = damage(base)
    stop = 9 if damage is promise_more_layers else 8
    recipe = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(base), "layer_range": pair}]} for pair in ([0, 3], [6, stop])],
    }
    (tmp_path / "r.yml").write_text(yaml.dump(recipe))
    refused(call, says, tmp_path, "prune", "r.yml", "out", "--writer", writer)


@pytest.mark.parametrize("damage", DAMAGES[:4])
def test_broken_models_get_no_recipe(damage: Callable[[Path], str], base: Path, call: Any, tmp_path: Path) -> None:
    refused(call, damage(base), tmp_path, "recipe", base, "-o", "r.yml", "--layers", "2")


@pytest.mark.parametrize(
    ("ranges", "says"),
    [
        ([[0, 5], [3, 8]], "overlap"),
        ([[0, 4], [4, 4], [6, 8]], "[4, 4]"),
        ([[0, 4], [6, 9]], "9"),
        ([[-1, 4]], "-1"),
        ([[5, 3]], "[5, 3]"),
        ([[4, 8], [0, 2]], "overlaps the one before it"),
    ],
)
def test_impossible_ranges(ranges: Any, says: str, tiny: Any, call: Any, tmp_path: Path) -> None:
    slices = [{"sources": [{"model": str(tiny("llama")), "layer_range": pair}]} for pair in ranges]
    (tmp_path / "r.yml").write_text(yaml.dump({"merge_method": "passthrough", "slices": slices}))
    refused(call, says, tmp_path, "prune", "r.yml", "out")


def test_two_models_in_one_slice(tiny: Any, call: Any, tmp_path: Path) -> None:
    sources = [{"model": str(tiny(kind)), "layer_range": [0, 4]} for kind in ("llama", "mistral")]
    recipe = {"merge_method": "passthrough", "slices": [{"sources": sources}]}
    (tmp_path / "r.yml").write_text(yaml.dump(recipe))
    refused(call, "2 sources", tmp_path, "prune", "r.yml", "out")
    recipe["slices"] = [{"sources": [source]} for source in sources]
    (tmp_path / "r.yml").write_text(yaml.dump(recipe))
    refused(call, "several models", tmp_path, "prune", "r.yml", "out")
