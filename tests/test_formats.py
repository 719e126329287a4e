"""Sources other than plain safetensors: pickles, a base with an adapter, quantised weights, a model's own code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import IRREGULAR, batch, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from test_cli import invoke
from transformers import AutoModelForImageTextToText

from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe
from lmprune.errors import ModelError, UsageError
from lmprune.forward.calls import skipping
from lmprune.models.checkpoint import read_config
from lmprune.models.cut import open_cut
from lmprune.models.loading import load_model
from lmprune.models.locate import locate
from lmprune.writing.pruning import prune
from lmprune.writing.support import best_writer

PLAN = Plan.from_kept(8, IRREGULAR)
DROP = ("--layers", "3-5")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LMPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    return lambda *words: invoke(capsys, monkeypatch, *words)


def save(folder: Path, kind: str = "llama", *, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    tiny_model(tiny_config(kind, **config)).to(dtype).save_pretrained(folder)
    return folder


def recipe(base: Path) -> Recipe:
    return Recipe(str(base), tuple(PLAN.slices()), layers=8)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=batch()).logits.float()


def truth(base: Path) -> torch.Tensor:
    whole = load_model(base)
    with skipping(whole, PLAN.dropped):
        return logits(whole)


def as_pickles(source: Path, out: Path, shards: int = 1) -> Path:
    """The same model with its weights as ``.bin``."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(source / "model.safetensors")
    if shards == 1:
        torch.save(tensors, out / "pytorch_model.bin")
        return out
    places = {name: f"pytorch_model-{i % shards}.bin" for i, name in enumerate(tensors)}
    for shard in set(places.values()):
        torch.save({name: tensors[name] for name in tensors if places[name] == shard}, out / shard)
    (out / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return out


@pytest.mark.parametrize("shards", [1, 3])
def test_pickles_are_converted_when_allowed(shards: int, call: Any, cache: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "safe", "qwen3", dtype=torch.bfloat16)
    pickled = as_pickles(source, tmp_path / "pickled", shards)
    code, _, err = call("recipe", pickled, "-o", "r.yml", *DROP)
    assert (code, err.count("\n")) == (1, 1) and "--allow-pickle" in err
    assert call("recipe", pickled, "-o", "r.yml", *DROP, "--allow-pickle")[0] == 0
    assert Recipe.read(tmp_path / "r.yml").model == str(pickled)
    assert "--allow-pickle" in call("prune", "r.yml", "out")[2]
    assert call("prune", "r.yml", "out", "--allow-pickle")[0] == 0
    assert torch.equal(logits(load_model(tmp_path / "out")), truth(source))
    assert len(list(cache.iterdir())) == 1, "converted once"
    assert call("verify", "r.yml", "out", "--allow-pickle")[0] == 0


def test_pickled_code_is_never_run(call: Any, cache: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    pickled = as_pickles(save(tmp_path / "safe"), tmp_path / "pickled")
    torch.save({"model.norm.weight": Trap()}, pickled / "pytorch_model.bin")
    code, _, err = call("recipe", pickled, "-o", "r.yml", *DROP, "--allow-pickle")
    assert (code, err.count("\n")) == (1, 1) and "more than tensors" in err
    assert not (tmp_path / "ran").exists() and not list(cache.glob("*")) and not (tmp_path / "r.yml").exists()


@pytest.fixture
def adapted(tmp_path: Path) -> tuple[Path, Path, torch.Tensor]:
    """A base, a random LoRA adapter for it, and the logits of both together without the dropped layers."""
    from peft import LoraConfig, get_peft_model

    base = save(tmp_path / "base")
    settings = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, r=4, lora_alpha=64)
    torch.manual_seed(0)
    model = get_peft_model(load_model(base), settings).eval()
    model.save_pretrained(tmp_path / "adapter")
    with skipping(model, PLAN.dropped):
        return base, tmp_path / "adapter", logits(model)


def test_a_base_with_an_adapter(adapted: tuple[Path, Path, torch.Tensor], call: Any, tmp_path: Path) -> None:
    base, adapter, wanted = adapted
    code, _, err = call("recipe", f"{base}+{adapter}", "-o", "r.yml", *DROP)
    assert code == 0, err
    read = Recipe.read(tmp_path / "r.yml")
    assert read.model == f"{base}+{adapter}" and read.revision is None
    code, _, err = call("prune", "r.yml", "out")
    assert code == 0, err
    got = logits(load_model(tmp_path / "out"))
    assert torch.allclose(got, wanted, atol=1e-4)
    assert not torch.allclose(got, truth(base), atol=1e-2), "the adapter matters"


def test_what_is_no_adapter_for_this_base_is_refused(
    adapted: tuple[Path, Path, torch.Tensor], call: Any, tmp_path: Path
) -> None:
    base, adapter, _ = adapted
    small = save(tmp_path / "small", hidden_size=16)
    quantised = shutil.copytree(base, tmp_path / "quantised")
    config = read_config(base) | {"quantization_config": {"quant_method": "fp8"}}
    (quantised / "config.json").write_text(json.dumps(config))
    for model, says in (
        (f"{base}+./none", "no adapter at './none'"),
        (f"{base}+{small}", "no adapter_config.json"),
        (f"{small}+{adapter}", "does not fit"),
        (f"{quantised}+{adapter}", "quantised"),
    ):
        code, _, err = call("recipe", model, "-o", "r.yml", *DROP)
        assert (code, err.count("\n")) == (1, 1) and says in err
    assert not (tmp_path / "r.yml").exists()


SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}


def quantised(kind: Any, out: Path) -> Path:
    """A tiny model stored in 4 or 8 bits."""
    source = save(out.with_name("source"), dtype=torch.bfloat16, **SIZES)
    if kind != "fp8":
        load_model(source, quantization=kind).save_pretrained(out)
        return out
    shutil.copytree(source, out)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if "proj" in name]:
        weight = tensors[name].float()
        scale = weight.abs().amax() / 400
        blocks = [(size + 127) // 128 for size in weight.shape]
        tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.full(blocks, scale.item())
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    stored = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head", "model.layers.4.mlp.gate", "model.layers.6.mlp.gate"],
    }
    (out / "config.json").write_text(json.dumps(read_config(source) | {"quantization_config": stored}))
    return out


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_quantised_weights_are_copied(kind: str, tmp_path: Path) -> None:
    base = quantised(kind, tmp_path / "base")
    done = prune(recipe(base), tmp_path / "out")
    assert done.writer == "copy" and "quantised" in done.reason
    assert done.proof and done.proof.largest_logit_difference == 0.0
    assert torch.equal(logits(load_model(tmp_path / "out")), truth(base))
    stored = read_config(tmp_path / "out")["quantization_config"]
    if kind == "fp8":
        assert stored["modules_to_not_convert"] == ["lm_head", "model.layers.3.mlp.gate"]
    with pytest.raises(UsageError, match="--writer copy"):
        prune(recipe(base), tmp_path / "other", writer="mergekit")


def test_quantised_weights_that_cannot_run_here_are_compared_by_their_bytes(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if "proj" in name]:
        tensors[name.replace("weight", "qweight")] = torch.ones(4, 8, dtype=torch.int32) * len(name)
        tensors[name.replace("weight", "scales")] = torch.ones(1, 8, dtype=torch.float16)
        del tensors[name]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (base / "config.json").write_text(json.dumps(read_config(base) | {"quantization_config": stored}))
    done = prune(recipe(base), tmp_path / "out")
    assert done.writer == "copy" and done.proof and not done.proof.logits_compared
    assert done.proof.logits_skipped and "\n" not in done.proof.logits_skipped
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")["model.layers.3.mlp.up_proj.qweight"],
        tensors["model.layers.6.mlp.up_proj.qweight"],
    )


OWN_CONFIG = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
OWN_MODEL = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2 SECRET
        return output
"""


def own_code(folder: Path, secret: str = "") -> Path:
    """A Llama of an unknown type whose code lies in its folder and doubles the logits."""
    save(folder)
    config = read_config(folder) | {"model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(OWN_CONFIG)
    (folder / "modeling_own.py").write_text(OWN_MODEL.replace("SECRET", secret))
    return folder


def test_a_models_own_code_runs_and_comes_along_only_when_trusted(call: Any, tmp_path: Path) -> None:
    base = own_code(tmp_path / "own")
    trusted = "--trust-remote-code"
    code, _, err = call("recipe", base, "-o", "r.yml", *DROP)
    assert (code, err.count("\n")) == (1, 1) and trusted in err
    assert call("recipe", base, "-o", "r.yml", *DROP, trusted)[0] == 0
    code, _, err = call("prune", "r.yml", "out")
    assert (code, err.count("\n")) == (1, 1) and trusted in err and not (tmp_path / "out").exists()
    code, out, err = call("prune", "r.yml", "out", trusted)
    assert code == 0 and "logits equal" in out, err
    assert {"modeling_own.py", "configuration_own.py"} <= {file.name for file in (tmp_path / "out").iterdir()}
    assert call("verify", "r.yml", "out")[0] == 1
    assert call("verify", "r.yml", "out", trusted)[0] == 0
    shutil.copytree(base, tmp_path / "plain")
    plain = read_config(base) | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "plain" / "config.json").write_text(json.dumps({k: v for k, v in plain.items() if k != "auto_map"}))
    model = load_model(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(logits(model), 2 * truth(tmp_path / "plain"))


def test_a_trusted_cut_stays_trusted(tmp_path: Path) -> None:
    base = own_code(tmp_path / "own")
    opened = open_cut(base, trust_remote_code=True)
    assert prune(opened.without(PLAN, "own"), tmp_path / "out", writer="copy").proof
    assert open_cut(opened, recipe=recipe(base)).trust_remote_code


def test_code_that_counts_its_layers_is_found_out(tmp_path: Path) -> None:
    """Nobody has measured this architecture, so the proof runs the whole base and not only what was repaired."""
    base = own_code(tmp_path / "own", "+ self.config.num_hidden_layers")
    with pytest.raises(Exception, match="the base whose dropped layers do nothing"):
        prune(recipe(base), tmp_path / "out", trust_remote_code=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
def test_multimodal_models(kind: str, tmp_path: Path) -> None:
    """The whole checkpoint, images and all: what is not a decoder layer stays, and the nested config is repaired."""
    config = tiny_config(kind)
    vision = {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
    for name in vision.keys() & config.vision_config.to_dict().keys():
        setattr(config.vision_config, name, vision[name])
    torch.manual_seed(0)
    base = tmp_path / "base"
    AutoModelForImageTextToText.from_config(config).save_pretrained(base)
    done = prune(recipe(base), tmp_path / "out")
    assert done.writer == "copy" and done.proof and done.proof.largest_logit_difference == 0.0
    text, before = read_config(tmp_path / "out")["text_config"], read_config(base)["text_config"]
    assert text["num_hidden_layers"] == 5
    assert text["layer_types"] == [before["layer_types"][layer] for layer in PLAN.kept]
    assert torch.equal(logits(load_model(tmp_path / "out")), truth(base))
    old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    others = [name for name in old if not ("language_model" in name and ".layers." in name)]
    assert any("vis" in name for name in others) and all(torch.equal(old[name], new[name]) for name in others)


def test_multimodal_models_without_a_causal_language_model_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "base")
    config = {"model_type": "qwen2_vl", "text_config": {"num_hidden_layers": 8}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no causal language model for 'qwen2_vl'"):
        prune(recipe(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_writer_follows_from_the_config() -> None:
    assert best_writer({"model_type": "llama"})[0] == "mergekit"
    assert best_writer({"model_type": "llama", "quantization_config": {"quant_method": "awq"}})[0] == "copy"
    assert best_writer({"model_type": "never_seen"})[0] == "copy"


def test_a_plus_in_a_folders_name_is_no_adapter(tmp_path: Path) -> None:
    assert locate(str(save(tmp_path / "a+b"))).path == tmp_path / "a+b"
