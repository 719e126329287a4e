"""Healing: what trains, what the teacher says, what is written, and what happens to killed runs."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe
from lmprune.errors import HostError, LmpruneError, ModelError, OutputError, UsageError, VerifyError
from lmprune.healing.methods import find_method
from lmprune.healing.settings import HealSettings
from lmprune.text.sources import DataSettings

DEMO = DataSettings(data="demo")
SHORT: dict[str, Any] = {
    "method": "lora",
    "steps": 4,
    "batch_size": 4,
    "max_length": 32,
    "eval_blocks": 4,
    "eval_every": 2,
    "rank": 4,
    "lr": 1e-3,
    "warmup": 1,
    "dtype": "float32",
}
CUT = Plan(8, (3, 4))


@pytest.fixture
def recipe(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """``recipe('llama')``: a recipe that drops layers 3 and 4 of the tiny model."""

    def make(kind: str = "llama", **config: Any) -> Path:
        folder = tiny(kind, **config)
        path = tmp_path / f"{kind}.yml"
        path.write_text(Recipe(str(folder), tuple(CUT.slices()), layers=8, dtype="bfloat16").to_yaml())
        return path

    return make


def _short(given: dict[str, Any]) -> dict[str, Any]:
    """`SHORT` with other values, and without a rank for a method that has none."""
    values = SHORT | given
    if not str(values.get("method", "lora")).startswith(("lora", "qlora", "distill")):
        del values["rank"]
    return values


def _heal(recipe: Path, out: Path, **given: Any) -> Any:
    from lmprune.healing import heal

    return heal(recipe, out, HealSettings(**_short(given)), DEMO)


def _weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


def _resolved(**given: Any) -> Any:
    from lmprune.healing.facts import Facts
    from lmprune.healing.presets import resolve

    return resolve(HealSettings(**_short(given)), Facts("llama", 64, 320, 8, 0.25))[0]


# --- the whole path ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full+distill"])
def test_writes_a_plain_checkpoint(recipe: Callable[..., Path], tmp_path: Path, method: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = _heal(recipe(), tmp_path / "out", method=method)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 6 and model.dtype == torch.bfloat16
    AutoTokenizer.from_pretrained(tmp_path / "out")
    lineage = json.loads((tmp_path / "out" / "lmprune.json").read_text())
    assert lineage["dropped"] == [3, 4] and lineage["healing"]["losses"]["healed"] == done.healed
    assert lineage["healing"]["data"]["hash"].startswith("sha256:") and lineage["versions"]["peft"]
    assert (tmp_path / "out" / "healing.png").stat().st_size > 1000
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".healing")]


@pytest.mark.parametrize("method", ["full+distill", "lora+distill", "last-layers+distill"])
def test_a_teacher_with_layer_norms_speaks_in_bfloat16(
    recipe: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    done = _heal(
        recipe("gpt2", n_embd=64, n_layer=8, n_head=4, n_positions=512),
        tmp_path / "out",
        method=method,
        dtype="bfloat16",
        steps=1,
    )
    assert done.steps == 1 and done.healed < 1.1 * done.pruned


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "opt", "phi", "gpt_neox"])
@pytest.mark.parametrize("method", ["lora", "lora+distill", "last-layers+distill"])
def test_methods_on_other_architectures(recipe: Callable[..., Path], tmp_path: Path, kind: str, method: str) -> None:
    extra = {"n_embd": 64, "n_layer": 8, "n_head": 4, "n_positions": 512} if kind == "gpt2" else {}
    extra |= {"ffn_dim": 128, "word_embed_proj_dim": 64} if kind == "opt" else {}
    assert _heal(recipe(kind, **extra), tmp_path / "out", method=method).merged_distance < 0.03


def test_qlora_merges_into_unquantised_weights(recipe: Callable[..., Path], tmp_path: Path) -> None:
    _heal(recipe(), tmp_path / "out", method="qlora")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert {str(value.dtype) for value in _weights(tmp_path / "out").values()} == {"torch.bfloat16"}


def test_four_bit_layers_stay_differentiable_after_an_evaluation(tiny: Callable[..., Path]) -> None:
    """bitsandbytes repacks them for inference in its first eval forward on some CPUs, and gradients stop there."""
    import torch

    from lmprune.healing.student import prepare
    from lmprune.models.loading import load_model

    model = load_model(tiny("llama"), dtype="float32", quantization="nf4", device="cpu")
    student, _ = prepare(model, _resolved(method="qlora").way, None, 0)
    ids = torch.arange(32)[None]

    def gradient() -> torch.Tensor:
        student.train()
        student.zero_grad()
        student(input_ids=ids, labels=ids).loss.backward()
        name = next(n for n, p in student.named_parameters() if p.requires_grad and "lora_B" in n)
        return student.get_parameter(name).grad.clone()

    before = gradient()
    with torch.no_grad():
        student.eval()(input_ids=ids)
    assert before.abs().max() > 0 and torch.allclose(gradient(), before, atol=1e-6)


def test_the_adapter_alone_belongs_to_the_pruned_layers(recipe: Callable[..., Path], tmp_path: Path) -> None:
    from lmprune.models.adapters import attach_adapter
    from lmprune.models.loading import load_model

    done = _heal(recipe(), tmp_path / "adapter", keep_adapter=True)
    base, adapter = Path(Recipe.read(recipe()).model), str(tmp_path / "adapter")
    attach_adapter(load_model(base, plan=CUT), adapter, base, CUT)
    with pytest.raises(ModelError, match="does not fit"):
        attach_adapter(load_model(base), adapter, base)
    assert done.healed < done.pruned


def test_an_unpruned_model_is_healed_and_that_is_said(
    tiny: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from lmprune.healing import heal

    caplog.set_level("INFO", "lmprune")
    done = heal(tiny("llama"), tmp_path / "out", HealSettings(**SHORT), DEMO)
    assert done.original is None and done.gap_closed is None
    assert "plain fine-tuning" in caplog.text


# --- what trains ---------------------------------------------------------------------------------------------------


def _prepared(folder: Path, **given: Any) -> Any:
    from lmprune.healing.student import prepare
    from lmprune.models.loading import load_model

    return prepare(load_model(folder, plan=CUT, dtype="float32"), _resolved(**given).way, CUT, 0)[0]


def test_junction_trains_the_layers_beside_the_cut(tiny: Callable[..., Path]) -> None:
    from lmprune.healing.methods.junction import beside_cut
    from lmprune.healing.student import trained_tensors

    model = _prepared(tiny("llama"), method="junction")
    assert {name.split(".")[2] for name in trained_tensors(model)} == {"2", "3"}
    assert beside_cut(Plan(8, (0, 1, 4, 7))) == [0, 1, 2, 3]


def test_tied_embeddings_stay_tied_unless_the_head_is_to_train(tiny: Callable[..., Path]) -> None:
    from lmprune.healing.student import trained_tensors

    folder = tiny("qwen3", tie_word_embeddings=True, head_dim=16)
    tied = _prepared(folder, method="last-layers", last=2)
    assert {name.split(".")[2] for name in trained_tensors(tied)} == {"4", "5"}
    untied = _prepared(folder, method="last-layers", last=1, head="train")
    assert "lm_head.weight" in trained_tensors(untied) and not untied.config.tie_word_embeddings
    assert not untied.get_input_embeddings().weight.requires_grad


def test_an_untied_head_is_written(recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe("qwen3", tie_word_embeddings=True, head_dim=16)
    _heal(path, tmp_path / "out", method="last-layers", last=1, head="train")
    weights = _weights(tmp_path / "out")
    assert not weights["lm_head.weight"].equal(weights["model.embed_tokens.weight"])


def test_lora_has_the_papers_rank_and_alpha_on_the_ffn(tiny: Callable[..., Path]) -> None:
    model = _prepared(tiny("llama"), method="lora", rank=4)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (4, 4)
    assert set(config.target_modules) == {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


@pytest.mark.parametrize(
    "kind, config, ffn",
    [
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2}, ["mlp.c_fc", "mlp.c_proj"]),
        (
            "opt",
            {
                "hidden_size": 32,
                "ffn_dim": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "word_embed_proj_dim": 32,
            },
            ["fc1", "fc2"],
        ),
        ("phi", {}, ["mlp.fc1", "mlp.fc2"]),
        ("gpt_neox", {}, ["mlp.dense_4h_to_h", "mlp.dense_h_to_4h"]),
        ("phi3", {"pad_token_id": 0}, ["mlp.down_proj", "mlp.gate_up_proj"]),
    ],
)
def test_ffn_projections_by_architecture(kind: str, config: dict[str, Any], ffn: list[str]) -> None:
    import transformers

    from lmprune.healing.targets import resolve_targets
    from lmprune.models.stack import find_stack

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    values = (small if kind in ("phi", "gpt_neox", "phi3") else {}) | {"vocab_size": 64} | config
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **values))
    assert resolve_targets(find_stack(model).layers, "ffn") == ffn


def test_fused_experts_are_refused() -> None:
    import transformers

    from lmprune.healing.targets import resolve_targets
    from lmprune.models.stack import find_stack

    config = transformers.AutoConfig.for_model(
        "mixtral",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=64,
    )
    layers = find_stack(transformers.AutoModelForCausalLM.from_config(config)).layers
    with pytest.raises(ModelError, match="fused"):
        resolve_targets(layers, "ffn")
    assert "self_attn.q_proj" in resolve_targets(layers, "attention")
    with pytest.raises(UsageError, match="x_proj"):
        resolve_targets(layers, "x_proj")


@pytest.mark.parametrize("kind", ["falcon_h1", "mamba", "mamba2", "jamba"])
def test_lora_keeps_off_what_state_space_kernels_read_themselves(kind: str) -> None:
    import torch
    from architectures import tiny_config, tiny_model

    from lmprune.healing.targets import resolve_targets
    from lmprune.models.adapters import add_lora
    from lmprune.models.stack import find_stack

    model = tiny_model(tiny_config(kind, **({"num_experts": 1} if kind == "jamba" else {})))
    found = resolve_targets(find_stack(model).layers, "all")
    assert any(name.endswith("in_proj") for name in found)
    assert not any(name.endswith(("dt_proj", "out_proj", "x_proj")) for name in found)
    adapted = add_lora(model, rank=2, alpha=2, dropout=0.0, modules=found, seed=0)
    ids = torch.arange(8)[None]
    adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "lora_B" in name)


def test_lora_sits_on_linear_attention_as_on_any_map() -> None:
    from architectures import tiny_config, tiny_model

    from lmprune.healing.targets import resolve_targets
    from lmprune.models.stack import find_stack

    found = resolve_targets(find_stack(tiny_model(tiny_config("qwen3_next"))).layers, "attention")
    assert "linear_attn.out_proj" in found


# --- the default ---------------------------------------------------------------------------------------------------

DEFAULT = {name: value for name, value in SHORT.items() if name not in ("method", "rank")}


def test_by_default_it_is_repaired_first(tmp_path: Path) -> None:
    import lmprune

    lmprune.write_recipe("demo", lmprune.Plan(12, (2, 3, 4)), tmp_path / "cut.yml")
    settings = HealSettings(**DEFAULT | {"fit_blocks": 32, "max_length": 64, "steps": 1})
    done = lmprune.heal(tmp_path / "cut.yml", tmp_path / "out", settings)
    told = json.loads((tmp_path / "out" / "lmprune.json").read_text())["healing"]
    assert done.method == "refit+full+distill" == told["settings"]["method"] and told["first"]["gap_closed"] > 0.2
    again = lmprune.heal(tmp_path / "out", tmp_path / "again", replace(settings, fit_blocks=None))
    assert again.method == "full" and again.repaired is None  # its weights are no longer the base's


def test_nothing_is_repaired_first_where_others_would_wait(
    recipe: Callable[..., Path], tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmprune.healing.facts import Facts
    from lmprune.models.cut import open_cut

    cut = open_cut(recipe())
    assert Facts.of(cut).repairable and not Facts.of(open_cut(tiny("llama"))).repairable
    for name, value in {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}.items():
        with monkeypatch.context() as launched:
            launched.setenv(name, value)
            assert not Facts.of(cut).repairable


@pytest.fixture
def useless(monkeypatch: pytest.MonkeyPatch) -> list[BaseException | None]:
    """What each call of a refit raises; None: it makes the model worse. The last counts for all that come after it."""
    from lmprune.healing.methods.refit import Refit

    planned: list[BaseException | None] = [None]

    def repair(self: Any, work: Any) -> Any:
        if (problem := planned.pop(0) if len(planned) > 1 else planned[0]) is not None:
            raise problem
        for parameter in work.student.parameters():
            parameter.data.mul_(5)
        work.kept.folder.mkdir(parents=True, exist_ok=True)
        (work.kept.folder / "layer-1.json").write_text("{}")
        return {}

    monkeypatch.setattr(Refit, "repair", repair)
    return planned


@pytest.mark.parametrize("killed", [False, True])
def test_a_repair_that_nobody_asked_for_may_not_help(
    recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    useless: list[BaseException | None],
    killed: bool,
) -> None:
    from lmprune.errors import UselessRepair
    from lmprune.healing import heal, learning

    settings = HealSettings(**DEFAULT)
    caplog.set_level("INFO", "lmprune")
    path = recipe()
    if killed:
        useless[:] = [None, AssertionError("it is not repaired twice")]
        with monkeypatch.context() as patch:
            patch.setattr(learning.Learning, "_trained", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                heal(path, tmp_path / "out", settings, DEMO)
        caplog.clear()
    done = heal(path, tmp_path / "out", settings, DEMO)
    told = json.loads((tmp_path / "out" / "lmprune.json").read_text())["healing"]
    assert (done.method, done.steps, told["settings"]["method"], told["first"]) == (
        "full+distill",
        4,
        "full+distill",
        None,
    )
    assert "full+distill alone, since --method refit does not help this cut" in caplog.text
    useless[:] = [None]
    for asked in ({"method": "refit+full"}, {"fit_blocks": 8}):
        with pytest.raises(UselessRepair):
            heal(path, tmp_path / "asked", HealSettings(**DEFAULT | asked), DEMO)
        assert not (tmp_path / ".asked.healing").exists(), "what does not help is not kept"


def test_memory_that_a_repair_lacks_is_asked_for_again(
    recipe: Callable[..., Path], tmp_path: Path, useless: list[BaseException | None], caplog: pytest.LogCaptureFixture
) -> None:
    from lmprune.healing import heal

    caplog.set_level("INFO", "lmprune")
    useless[:] = [RuntimeError("CUDA out of memory")]
    assert heal(recipe(), tmp_path / "out", HealSettings(**DEFAULT), DEMO).method == "full+distill"
    assert "full+distill alone, since CUDA out of memory" in caplog.text
    for problem in (OutputError("no room"), VerifyError("not the same"), RuntimeError("a fault of ours")):
        useless[:] = [problem]
        with pytest.raises(type(problem), match=str(problem)):
            heal(recipe(), tmp_path / "other", HealSettings(**DEFAULT), DEMO)
    assert not (tmp_path / ".other.healing" / "unrepaired").exists()


def test_room_for_two_is_no_condition_of_training(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmprune.healing import heal, run

    room = run.require_room

    def one(cut: Any, out: Path, *, copies: int) -> None:
        if copies > 1:
            raise OutputError("no room for two")
        room(cut, out, copies=copies)

    monkeypatch.setattr(run, "require_room", one)
    assert heal(recipe(), tmp_path / "out", HealSettings(**DEFAULT), DEMO).method == "full+distill"
    with pytest.raises(OutputError, match="no room for two"):
        heal(recipe(), tmp_path / "asked", HealSettings(method="refit+full", **DEFAULT), DEMO)


def test_where_all_weights_have_no_room_lora_trains(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lmprune.healing import heal, run

    caplog.set_level("INFO", "lmprune")
    monkeypatch.setattr(run, "free_memory", lambda device: 1000)
    assert heal(recipe(), tmp_path / "out", HealSettings(**DEFAULT, repair_first=False), DEMO).method == "lora"
    assert "lora, --targets all, since all weights, gradients and AdamW's means take" in caplog.text


def test_fewer_blocks_at_once_keep_the_repair(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lmprune
    from lmprune.healing import learning
    from lmprune.healing.methods.refit import Refit

    lmprune.write_recipe("demo", lmprune.Plan(12, (2, 3, 4)), tmp_path / "cut.yml")
    given = DEFAULT | {"fit_blocks": 32, "max_length": 64, "steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr(learning.Learning, "_trained", lambda *_: (_ for _ in ()).throw(LmpruneError("out of memory")))
        with pytest.raises(LmpruneError, match="out of memory"):
            lmprune.heal(tmp_path / "cut.yml", tmp_path / "out", HealSettings(**given))
    monkeypatch.setattr(Refit, "repair", lambda *_: pytest.fail("it was repaired before"))
    done = lmprune.heal(tmp_path / "cut.yml", tmp_path / "out", HealSettings(**given, micro_batch_size=1))
    assert done.method == "refit+full+distill" and done.steps == 1


def test_what_rounding_does_is_measured_and_not_refused() -> None:
    """Here the type of the weights loses all that was learnt: no fault of merging."""
    import torch
    from torch import nn

    from lmprune.healing.writing import _round, probe_logits

    class Sums(nn.Module):
        config, device = type("Config", (), {"dtype": None})(), torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6, 50) + 0.003 * torch.tensor([0.0, 1.0] * 3)[:, None])

        def forward(self, input_ids: Any, **_: Any) -> Any:
            return type("Output", (), {"logits": self.weight.float().sum(1).expand(*input_ids.shape, 6)})

    model, ids = Sums(), torch.zeros(1, 4, dtype=torch.long)
    found = _round(model, {"weight": torch.bfloat16}, ids, probe_logits(model, ids))
    found.require("")
    assert found.relative_distance == 0 and found.rounding == pytest.approx(1, abs=1e-3)
    assert model.weight.dtype == torch.bfloat16


@pytest.mark.slow
def test_a_proof_that_fails_costs_no_training(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmprune.healing import training, writing

    step, apart = training.HealTrainer.training_step, writing.relative_distance
    trained: list[bool] = []
    with monkeypatch.context() as patch:  # what is tried before the first step is right
        patch.setattr(
            training.HealTrainer, "training_step", lambda *args, **more: trained.append(True) or step(*args, **more)
        )
        patch.setattr(writing, "relative_distance", lambda ours, theirs: 0.5 if trained else apart(ours, theirs))
        with pytest.raises(VerifyError, match="with --keep-adapter writes it, without training again"):
            _heal(recipe(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(training.HealTrainer, "training_step", None)
    assert _heal(recipe(), tmp_path / "out", keep_adapter=True).steps == SHORT["steps"]


# --- the token that begins a text --------------------------------------------------------------------------------


def test_models_that_begin_texts_are_healed_and_measured_so(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block begins with the token, no loss asks for it, and losses are those of a direct computation."""
    import numpy as np
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    from lmprune.healing import heal, training
    from lmprune.healing.settings import HealSettings
    from lmprune.models.loading import load_model

    folder = tmp_path / "base"
    shutil.copytree(tiny("llama"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "<|pad|>"})
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", begin)]
    )
    tokenizer.save_pretrained(folder)
    path = tmp_path / "r.yml"
    path.write_text(Recipe(str(folder), tuple(CUT.slices()), layers=8, dtype="bfloat16").to_yaml())
    kept: list[Any] = []

    class Noted(training.BlockData):
        def __init__(self, *given: Any, **more: Any) -> None:
            super().__init__(*given, **more)
            kept.append(self)

    monkeypatch.setattr(training, "BlockData", Noted)
    done = heal(path, tmp_path / "out", HealSettings(**SHORT | {"max_length": 192}), DEMO)
    train, held_out = kept
    assert (train.blocks[:, 0] == begin).all() and (held_out.blocks[:, 0] == begin).all()
    inside = held_out.blocks[:, 1:] == begin
    assert inside.any() and all(held_out[i]["labels"][1:][torch.from_numpy(inside[i])].eq(-100).all() for i in range(4))
    with torch.no_grad():
        ids = torch.from_numpy(held_out.blocks.astype(np.int64))
        log_p = load_model(folder, dtype="float32")(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    each = -log_p.gather(-1, ids[:, 1:, None])[..., 0]
    assert done.original == pytest.approx(float(each[ids[:, 1:] != begin].mean()), rel=1e-6)
    with pytest.raises(UsageError, match="--no-pack"):
        heal(path, tmp_path / "other", HealSettings(**SHORT), DataSettings(data="demo", pack=False))


# --- the teacher ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("method", ["lora", "full", "junction", "last-layers"])
def test_the_teacher_is_the_unpruned_model_even_after_training(
    tiny: Callable[..., Path], kind: str, method: str
) -> None:
    """Its logits, and the student's loss, equal those of two separate models."""
    import torch

    from lmprune.forward.calls import leaving
    from lmprune.healing.student import prepare, trained_tensors
    from lmprune.healing.teacher import distance
    from lmprune.models.loading import load_model
    from lmprune.models.stack import find_stack

    folder = tiny(kind, **({"head_dim": 16} if kind == "qwen3" else {}))
    settings = _resolved(method=f"{method}+distill", top_k=0, hard=0.5, kl=2.0, aux=3.0, states=4.0, temperature=1.5)
    model = load_model(folder, dtype="float32")
    teacher = settings.lesson.take_apart(model, CUT)
    student, _ = prepare(model, settings.way, CUT, 0)
    teacher.freeze_twins(student, adapter=settings.way.adapter)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained_tensors(student).values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    assert teacher.shared_layers == {"lora": 0, "full": 0, "junction": 2, "last-layers": 3}[method]

    ids = torch.randint(320, (2, 16))
    whole = load_model(folder, dtype="float32")
    with torch.no_grad():
        states = whole(input_ids=ids, output_hidden_states=True).hidden_states
        log_p = (whole(input_ids=ids).logits[:, :-1] / 1.5).log_softmax(-1)
        alone = copy.deepcopy(student)
        own = alone(input_ids=ids, output_hidden_states=True)
        log_q = (own.logits[:, :-1] / 1.5).log_softmax(-1)
    hard = torch.nn.functional.cross_entropy(own.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    aux = distance(own.hidden_states[3], states[5])
    ends = []  # what is handed on is not normed; what leaves the last layer comes normed among the hidden states
    for each in (alone, whole):
        with leaving(find_stack(each).layers[-1], ends.append), torch.no_grad():
            each(input_ids=ids)
    pairs = [*zip(own.hidden_states[3:6], states[5:8], strict=True), tuple(ends)]
    far = torch.stack([distance(ours, theirs) for ours, theirs in pairs]).mean()
    student.train()
    loss = teacher.loss(student, ids)
    assert torch.allclose(loss, 0.5 * hard + 2.0 * 1.5**2 * kl + 3.0 * aux + 4.0 * far, rtol=1e-4)
    apart = settings.lesson.apart(whole, CUT).loss(alone.train(), ids)
    assert torch.allclose(loss, apart, rtol=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in trained_tensors(student).values())


def test_coarse_divergence_is_a_divergence_below_the_full_one() -> None:
    import torch

    from lmprune.healing.teacher import Lesson, divergence, likeliest

    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 3, 50), torch.randn(2, 3, 50)
    values = []
    for k in (5, 20, 0):
        values.append(divergence(ours.log_softmax(-1), Lesson(*likeliest(theirs, k), [], None)).mean())
    assert 0 < values[0] < values[1] < values[2]
    assert divergence(theirs.log_softmax(-1), Lesson(*likeliest(theirs, 5), [], None)).abs().max() < 1e-5


# --- what can go wrong ---------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import Trainer

    real, calls = Trainer.training_step, []

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(self, *args, **kwargs) * (torch.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(Trainer, "training_step", step)
    with pytest.raises(LmpruneError, match=r"loss became nan at step 3\..*checkpoint-2"):
        _heal(recipe(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _memory_for(blocks: int, monkeypatch: pytest.MonkeyPatch, *, recomputing: int = 0) -> None:
    """Let a step run out of memory with more than so many blocks at once."""
    import torch
    from transformers import Trainer

    real = Trainer.training_step

    def step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        room = recomputing if self.model.is_gradient_checkpointing else blocks
        if len(inputs["input_ids"]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", step)


@pytest.mark.parametrize(
    "room, recomputing, said",
    [
        (2, 4, r"4 blocks of 32 tokens at once\. Use --micro-batch-size 2, which was tried and fits"),
        (0, 2, r"Use --micro-batch-size 2 --gradient-checkpointing, which was tried"),
        (0, 0, r"one block at once with --gradient-checkpointing does not fit\. Use --method qlora or --max-length 16"),
    ],
)
def test_short_memory_is_one_line_with_settings_that_fit(
    recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    room: int,
    recomputing: int,
    said: str,
) -> None:
    _memory_for(room, monkeypatch, recomputing=recomputing)
    with pytest.raises(LmpruneError, match=said):
        _heal(recipe(), tmp_path / "out")


def test_what_fits_is_accepted_after_memory_ran_out(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _memory_for(2, monkeypatch)
    with pytest.raises(LmpruneError, match="--micro-batch-size 2"):
        _heal(recipe(), tmp_path / "out")
    assert _heal(recipe(), tmp_path / "out", micro_batch_size=2).steps == 4


def test_a_setting_that_was_tried_was_tried_with_the_optimizer(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where memory runs out in the middle of an accumulation, when Trainer has the optimizer stand still."""
    import torch

    steps: list[int] = []
    real = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr("lmprune.healing.learning.measure", lambda *args, **how: None)
    _memory_for(1, monkeypatch)
    with pytest.raises(LmpruneError, match="--micro-batch-size 1, which was tried"):
        _heal(recipe(), tmp_path / "out", micro_batch_size=2)
    assert steps, "no step of the run itself came so far"
    assert torch.is_grad_enabled()


def test_losses_and_shares_know_how_sure_they_are() -> None:
    """Against naive renderings: of equal blocks the error of a mean; of a share, that of many resamples."""
    import numpy as np

    from lmprune.forward.loss import Losses, of_sums
    from lmprune.healing.training import Levels

    rng = np.random.default_rng(0)
    blocks = np.full((200, 9), 5, np.int32)
    hard = rng.normal(3, 0.5, 200)  # what all three find hard
    original, pruned, healed = (
        of_sums(8 * (hard + rise + rng.normal(0, 0.1, 200)), blocks, None) for rise in (0, 1, 0.4)
    )
    assert healed.own_errors()[0] == pytest.approx(healed.values[0].std(ddof=1) / 200**0.5)
    levels = Levels(pruned, original)
    assert levels.closed(float(healed.mean()[0])) == pytest.approx(0.6, abs=0.05)
    shares = []
    for _ in range(2000):
        drawn = rng.integers(200, size=200)
        o, p, h = (one.values[0][drawn].mean() for one in (original, pruned, healed))
        shares.append((p - h) / (p - o))
    assert levels.closed_error(healed) == pytest.approx(np.std(shares), rel=0.15)
    assert Levels(pruned, None).closed_error(healed) is None
    assert np.isnan(Losses(np.ones((1, 1)), np.ones(1, np.int64)).own_errors()[0])


def test_the_held_out_loss_takes_smaller_batches_where_memory_is_short(tiny: Callable[..., Path]) -> None:
    import numpy as np
    import torch

    from lmprune.forward.loss import held_out_loss
    from lmprune.models.loading import load_model

    model = load_model(tiny("llama"), dtype="float32")
    blocks = np.random.default_rng(0).integers(0, 300, (7, 16), dtype=np.int32)
    whole = held_out_loss(model, blocks, batch=4)

    class Small(torch.nn.Module):
        device, most = model.device, 1

        def forward(self, input_ids: Any, **kwargs: Any) -> Any:
            if len(input_ids) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return model(input_ids=input_ids, **kwargs)

    assert held_out_loss(Small(), blocks, batch=4) == pytest.approx(whole, abs=1e-5)
    small = Small()
    small.most = 0
    with pytest.raises(LmpruneError, match="one held-out block of 16 tokens"):
        held_out_loss(small, blocks, batch=4)


def test_a_model_too_large_for_the_device_is_worked_on_elsewhere(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    from lmprune.healing.student import live_where_it_fits
    from lmprune.models import loading
    from lmprune.models.cut import open_cut

    real = loading.load_model

    def load(folder: Path, *, device: str, **kwargs: Any) -> Any:
        if device == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(folder, device=device, **kwargs)

    caplog.set_level("INFO", "lmprune")
    monkeypatch.setattr(loading, "load_model", load)
    model = live_where_it_fits(open_cut(tiny("llama")), dtype="float32", device="cuda")
    assert model.device.type == "cpu" and "working on the CPU" in caplog.text


@pytest.mark.parametrize(
    "given, said",
    [
        ({"micro_batch_size": 3}, "--micro-batch-size 3"),
        ({"targets": "nonsense"}, "--targets 'nonsense'"),
        ({"method": "last-layers", "last": 99}, "--last 99"),
        ({"patience": 0}, "--patience 0"),
        ({"report_to": "none,tensorboard"}, "--report-to none,tensorboard"),
    ],
)
def test_what_cannot_work_is_said_before_any_text_is_read(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], said: str
) -> None:
    from lmprune.healing import reading as healing

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("text was read")

    monkeypatch.setattr(healing, "read_held_out", never)
    with pytest.raises(LmpruneError, match=said):
        _heal(recipe(), tmp_path / "out", **given)


@pytest.mark.parametrize(
    "history", ['{"dropped": [1]}', '{"dropped": [1], "layers": "x"}', '{"dropped": 3, "layers": 8}']
)
def test_a_history_that_makes_no_sense_is_one_line(tiny: Callable[..., Path], tmp_path: Path, history: str) -> None:
    import shutil

    from lmprune.models.cut import open_cut

    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    (folder / "lmprune.json").write_text(history)
    with pytest.raises(ModelError, match="does not say what was cut"):
        _ = open_cut(folder).origin


def test_a_base_without_a_name_is_no_base(tiny: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    from lmprune.models.cut import open_cut

    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    (folder / "lmprune.json").write_text('{"dropped": [1], "layers": 9, "base": null}')
    origin = open_cut(folder).origin
    assert origin.base is None and "does not name its base" in str(origin.problem)


def test_what_is_there_is_not_overwritten(recipe: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        _heal(recipe(), tmp_path / "out")


def test_teaching_needs_the_unpruned_model(tiny: Callable[..., Path], tmp_path: Path) -> None:
    from lmprune.healing import heal

    with pytest.raises(UsageError, match="distill needs the unpruned model"):
        heal(tiny("llama"), tmp_path / "out", HealSettings(**SHORT | {"method": "distill"}), DEMO)


# --- resuming and several processes --------------------------------------------------------------------------------


def _command(recipe: Path, out: Path, *more: str) -> list[str]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SHORT.items()]
    return ["-m", "lmprune", "heal", str(recipe), str(out), "--data", "demo", *options, *more]


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_weights(recipe: Callable[..., Path], tmp_path: Path) -> None:
    path, more = recipe(), ("--steps=60", "--eval-every=10", "--dropout=0.1")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([sys.executable, *_command(path, whole, *more)], env=_environment(), check=True, capture_output=True)
    process = subprocess.Popen(
        [sys.executable, *_command(path, killed, *more)], env=_environment(), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 30/"):
            time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    assert not killed.exists() and (tmp_path / ".killed.healing").is_dir()
    again = subprocess.run(
        [sys.executable, *_command(path, killed, *more)], env=_environment(), check=True, capture_output=True, text=True
    )
    assert "going on after step" in again.stderr
    ours, theirs = _weights(killed), _weights(whole)
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_a_run_that_lost_patience_does_not_go_on_after_a_kill(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmprune.healing import writing

    path, given = recipe(), {"steps": 8, "eval_every": 1, "lr": 1e-12, "patience": 2}
    whole = _heal(path, tmp_path / "whole", **given)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing.Merger, "keep", stop)
        with pytest.raises(KeyboardInterrupt):
            _heal(path, tmp_path / "killed", **given)
    again = _heal(path, tmp_path / "killed", **given)
    assert again.steps == whole.steps < 8 and again.best_step == whole.best_step
    ours, theirs = _weights(tmp_path / "killed"), _weights(tmp_path / "whole")
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "lora+distill"])
def test_two_processes_lose_what_one_loses(recipe: Callable[..., Path], tmp_path: Path, method: str) -> None:
    path, losses = recipe(), []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        # Not by accelerate launch, which on the CPU starts one process whatever it is told.
        launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        subprocess.run(
            [sys.executable, "-m", *launch, *_command(path, out, f"--method={method}", "--micro-batch-size=1")],
            env=_environment(),
            check=True,
            capture_output=True,
        )
        losses.append(json.loads((out / "lmprune.json").read_text())["healing"]["held_out"])
    assert [step for step, _ in losses[0]] == [step for step, _ in losses[1]]
    assert max(abs(a - b) for (_, a), (_, b) in zip(*losses)) < 1e-4


def test_an_unfinished_run_with_other_settings_is_not_mixed_in(recipe: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / ".out.healing" / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    (checkpoint / "trained.safetensors").write_text("")
    (tmp_path / ".out.healing" / "run.json").write_text("{}")
    with pytest.raises(OutputError, match="--no-resume"):
        _heal(recipe(), tmp_path / "out")
    assert _heal(recipe(), tmp_path / "out", resume=False).path.is_dir()


# --- does it heal? -------------------------------------------------------------------------------------------------


def test_healing_lowers_held_out_loss_on_the_demo_model(tmp_path: Path) -> None:
    path = tmp_path / "demo.yml"
    path.write_text(Recipe("demo", ((0, 2), (5, 12)), layers=12).to_yaml())
    done = _heal(path, tmp_path / "out", steps=20, batch_size=8, max_length=128, rank=16, lr=4e-3, eval_every=20)
    assert done.original is not None and done.original < done.healed < done.pruned
    assert done.gap_closed is not None and done.gap_closed > 0.3


# --- methods of other packages -------------------------------------------------------------------------------------

LEAST_SQUARES = '''
"""Refit the last projection before the cut, so that what it writes makes up for the layers that are gone."""

from dataclasses import dataclass

from lmprune import Repairing, option


@dataclass(frozen=True)
class Refit(Repairing):
    strength: float = option(0.01, "Ridge, as a share of the mean diagonal.")

    def repair(self, work):
        start, stop = work.plan.dropped[0], work.plan.dropped[-1] + 1
        path = work.layer(start - 1) + ".mlp.down_proj"
        points = work.student_input(path), work.student_state(start), work.whole_state(stop)
        gram = reached = None
        for inputs, ours, theirs in work.batches(*points):
            inputs, wanted = inputs.double(), (theirs - ours).double()
            gram = inputs.T @ inputs + (0 if gram is None else gram)
            reached = inputs.T @ wanted + (0 if reached is None else reached)
        gram.diagonal().add_(self.strength * gram.diagonal().mean())
        weight = work.student.get_submodule(path).weight
        weight.data += gram.inverse().matmul(reached).T.to(weight.dtype)
        work.say(f"held-out loss {work.held_out_loss():.4f}")
'''


def test_another_package_adds_a_repair(package: Callable[..., None], run: Any, tmp_path: Path) -> None:
    assert "import torch" not in LEAST_SQUARES and "hook" not in LEAST_SQUARES and "lm_eval" not in LEAST_SQUARES
    package("lmprune.methods", "refit_one", LEAST_SQUARES.strip(), "Refit")
    path = tmp_path / "demo.yml"
    path.write_text(Recipe("demo", ((0, 2), (5, 12)), layers=12).to_yaml())
    assert "--strength" in run("lmprune", "heal", "--help", fresh=True).stdout
    words = ("--method", "refit_one", "--fit-blocks", "16", "--eval-blocks", "8", "--json")
    done = json.loads(run("lmprune", "heal", path, "out", *words).stdout)
    assert done["method"] == "refit_one" and done["steps"] == 0
    losses = {name: one["value"] for name, one in done["losses"].items()}
    assert losses["original"] < losses["healed"] < losses["pruned"]
    assert done["gap_closed"]["value"] > 0.3 and 0 < done["gap_closed"]["error"] < 0.2
    told = json.loads((tmp_path / "out" / "lmprune.json").read_text())
    assert told["stage"] == "heal" and told["healing"]["settings"]["strength"] == 0.01 and told["dropped"] == [2, 3, 4]
    run("lmprune", "heal", path, "worse", *words, "--strength", "-0.9", code=1, fresh=True)
    assert not (tmp_path / "worse").exists(), "what does not help is not written"


def test_a_method_that_is_not_finished_says_what_it_lacks(package: Callable[..., None]) -> None:
    for number, (kind, lacking) in enumerate((("Repairing", "repair"), ("Teaching", "apart"))):
        package(
            "lmprune.methods",
            f"half{number}",
            f"from lmprune.healing.methods import {kind}\nclass Half({kind}): ...\n",
            "Half",
        )
        with pytest.raises(HostError, match=f"--method half{number}: .* has no '{lacking}'"):
            find_method(f"half{number}")


def test_a_cut_with_an_adapter_is_not_taught_nor_given_another(recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe()
    _heal(path, tmp_path / "adapter", keep_adapter=True)
    adapted = f"{path}+{tmp_path / 'adapter'}"
    for given in ({"method": "lora+distill"}, {"keep_adapter": True}):
        with pytest.raises(UsageError, match="was healed before"):
            _heal(adapted, tmp_path / "out", **given)  # type: ignore[arg-type]
    again = _heal(adapted, tmp_path / "out")  # type: ignore[arg-type]
    assert again.pruned == pytest.approx(_result(tmp_path / "adapter").healed, abs=1e-4)


def _result(folder: Path) -> Any:
    from lmprune.healing import HealResult

    return HealResult.read(folder)
