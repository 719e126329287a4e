"""Presets, methods and blocks: pure parts of healing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmprune.errors import DataError, ModelError, UsageError
from lmprune.healing.facts import Facts
from lmprune.healing.methods import METHODS, find_method, method_options, option_names
from lmprune.healing.methods.distill import Distill
from lmprune.healing.methods.full import Full
from lmprune.healing.methods.last_layers import LastLayers
from lmprune.healing.methods.refit import Refit
from lmprune.healing.presets import GROMOV_MODELS, PRESETS, resolve
from lmprune.healing.settings import HealSettings
from lmprune.text.blocks import Blocks, read_blocks, read_held_out
from lmprune.text.sources import DataSettings

LLAMA_13B = Facts("llama", 5120, 32000, 40, 0.3, 4096)
SMALL = Facts("qwen3", 128, 1280, 12, 0.25, 512)


@pytest.mark.parametrize("method", [*(name for name in METHODS if name != "distill"), "lora+distill", "refit+full"])
def test_every_choice_of_a_method_can_be_overridden_and_only_those(method: str) -> None:
    _, *parts = find_method(method)
    used = set().union(*(option_names(part) for part in parts if part is not None))
    offered = {field.name for field in fields(HealSettings)}
    assert used <= offered
    for name in {field.name for field in fields(method_options())} - used:
        value = "nf4" if name == "quantization" else 1
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} {value}: --method .* does not use it"):
            resolve(HealSettings(method=method, **{name: value}), SMALL)


def test_pure_modules_import_no_torch() -> None:
    modules = "lmprune.healing.presets, lmprune.healing.settings, lmprune.cli.heal"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_gromov_is_the_papers_table() -> None:
    resolved, notes = resolve(HealSettings(preset="gromov"), LLAMA_13B)
    settled: Any = resolved.way
    assert (settled.rank, settled.alpha, settled.lr, settled.max_length) == (64, 64, 3e-4, 4096)
    assert (settled.steps, settled.batch_size, settled.warmup, settled.schedule) == (5000, 16, 100, "cosine")
    assert (resolved.method, settled.quantization, settled.dropout, settled.targets) == ("qlora", "nf4", 0.05, "ffn")
    assert "Llama-2 13B" in notes[0]
    assert all(length in (2048, 4096) for *_, length in GROMOV_MODELS.values())


def test_gromov_on_another_model_starts_at_rank_64_and_fits_its_window() -> None:
    resolved, notes = resolve(HealSettings(preset="gromov"), SMALL)
    settled: Any = resolved.way
    assert settled.rank == 64 and settled.max_length == 512
    assert "not in the paper's table" in notes[0] and "512" in notes[1]


@pytest.mark.parametrize("share, rank, lr", [(0.1, 8, 1e-4), (0.25, 8, 5e-5), (0.35, 16, 5e-5), (0.5, 16, 2e-5)])
def test_review_goes_by_the_share_pruned(share: float, rank: int, lr: float) -> None:
    resolved, _ = resolve(HealSettings(preset="review"), Facts("llama", 4096, 32000, 32, share))
    settled: Any = resolved.way
    assert (resolved.method, settled.rank, settled.lr) == ("qlora", rank, lr)


def test_reassessing_trains_the_head_and_three_layers() -> None:
    resolved, _ = resolve(HealSettings(preset="reassessing"), LLAMA_13B)
    settled: Any = resolved.way
    assert (resolved.method, settled.last, settled.head, settled.lr, settled.batch_size) == (
        "last-layers",
        3,
        "train",
        1e-5,
        64,
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_options_override_a_preset(preset: str) -> None:
    settled, _ = resolve(HealSettings(preset=preset, method="full+distill", steps=7, lr=0.5), SMALL)
    way: Any = settled.way
    assert (settled.method, way.steps, way.lr) == ("full+distill", 7, 0.5)
    assert "rank" not in settled.to_data() and settled.to_data()["kl"] == 1.0


@pytest.mark.parametrize(
    "wrong, part",
    [
        ({"preset": "gromof"}, "did you mean 'gromov'"),
        ({"method": "lorra"}, "did you mean 'lora'"),
        ({"method": "full+lora"}, "join one of"),
        ({"method": "refit+replaceme"}, "join one of"),
        ({"method": "refit+full", "until_layer": 3, "what": "none"}, "--what 'none'"),
        ({"steps": 0}, "--steps 0"),
        ({"lr": -1.0}, "--lr -1"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"dropout": float("nan")}, "--dropout nan"),
        ({"seed": -1}, "--seed -1"),
        ({"method": ""}, "--method ''"),
        ({"max_length": 4096}, "512 tokens at most"),
        ({"quantization": "nf4", "method": "full"}, "--quantization nf4: --method full does not use it"),
        ({"quantization": "nf5", "method": "qlora"}, "--quantization 'nf5'"),
        ({"device": "mps"}, "--device mps: healing works on a GPU of CUDA or on the CPU"),
        ({"device": "gpu"}, "--device 'gpu' is no device"),
        ({"dtype": "float16"}, "--dtype 'float16' does not exist"),
        ({"method": "distill", "kl": 0.0, "hard": 0.0}, "nothing to learn"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        resolve(HealSettings(**wrong), SMALL)


def test_methods() -> None:
    assert find_method("distill+junction").name == "junction+distill"
    assert find_method("distill").name == "lora+distill"
    assert find_method("last-layers") == ("last-layers", LastLayers, None, None)
    assert find_method("refit") == ("refit", Refit, None, None)
    assert find_method("full+refit") == ("refit+full", Full, None, Refit)


def test_a_repair_and_what_trains_after_it_have_their_own_options_and_one_text() -> None:
    settled, _ = resolve(HealSettings(method="refit+full", fit_blocks=9, steps=2, batch_size=3, max_length=64), SMALL)
    assert settled.first is not None and isinstance(settled.way, Full)
    assert (settled.first.max_length, settled.way.max_length, settled.blocks) == (64, 64, 9)
    assert settled.to_data()["fit_blocks"] == 9 and settled.to_data()["steps"] == 2


REPAIRABLE, LARGE = replace(SMALL, repairable=True), replace(LLAMA_13B, repairable=True)


@pytest.mark.parametrize(
    "facts, given, method",
    [
        (REPAIRABLE, {}, "refit+full+distill"),
        (replace(REPAIRABLE, hidden=640), {}, "refit+full"),
        (REPAIRABLE, {"kl": 0.5}, "refit+full+distill"),
        (SMALL, {}, "full"),
        (LARGE, {}, "refit+lora"),
        (LLAMA_13B, {}, "lora"),
        (REPAIRABLE, {"rank": 4}, "refit+lora"),
        (REPAIRABLE, {"quantization": "nf4"}, "refit+lora"),
        (SMALL, {"rank": 4}, "lora"),
        (REPAIRABLE, {"keep_adapter": True}, "lora"),
        (REPAIRABLE, {"document_mask": True}, "full+distill"),
        (REPAIRABLE, {"budget": "5m"}, "full+distill"),
        (LARGE, {"budget": "5m", "rank": 4}, "lora"),
        (REPAIRABLE, {"budget": "5m", "rank": 4, "fit_blocks": 64}, "refit+lora"),
        (REPAIRABLE, {"repair_first": False}, "full+distill"),
        (REPAIRABLE, {"repair_first": False, "kl": 0.5}, "full+distill"),
        (REPAIRABLE, {"method": "lora"}, "lora"),
    ],
)
def test_quick_takes_what_wins_of_what_can_be_done(facts: Facts, given: dict[str, Any], method: str) -> None:
    settled, notes = resolve(HealSettings(**given), facts)
    assert settled.method == method and not notes
    told = settled.to_data()
    assert settled.asked is bool(given.keys() & {"method", "fit_blocks"})
    instead = settled.alone.method if settled.alone else None
    assert instead == (method.removeprefix("refit+") if settled.first and not settled.asked else None)
    if "method" not in given:
        assert told.get("targets") == ("all" if "lora" in method else None)
        assert told.get("states") == (80.0 if "distill" in method else None)
        assert told.get("fit_blocks") == (None if "refit" not in method else 640 if facts is LARGE else 64)
    else:
        assert told["targets"] == "ffn"


def test_models_that_people_use_are_trained_at_smaller_rates() -> None:
    rates = {
        hidden: resolve(HealSettings(), replace(REPAIRABLE, hidden=hidden))[0].to_data()["lr"]
        for hidden in (128, 640, 2048)
    }
    assert rates == {128: 2e-3, 640: 1e-4, 2048: 2e-4}  # of everything and taught, of everything, of LoRA


def test_a_teacher_that_the_model_does_not_allow_is_left_out() -> None:
    def narrowed(part: Any) -> None:
        if isinstance(part, Distill):
            raise UsageError("--states: of another size. Leave it out")

    settled, notes = resolve(HealSettings(), REPAIRABLE, narrowed)
    assert settled.method == "refit+full" and settled.alone is not None and settled.alone.method == "full"
    assert notes == ["refit+full, since --states: of another size"]


def test_an_adapter_alone_has_no_repair_and_no_end_is_sought_for_ever() -> None:
    settled, _ = resolve(HealSettings(keep_adapter=True, kl=0.5), REPAIRABLE)
    assert settled.alone is None and settled.method == "refit+full+distill"  # which `heal` refuses


def test_what_only_a_repair_uses_asks_for_it() -> None:
    assert resolve(HealSettings(until_layer=5), REPAIRABLE)[0].asked
    assert resolve(HealSettings(stream=True), REPAIRABLE)[0].asked
    assert not resolve(HealSettings(steps=5, eval_blocks=2), REPAIRABLE)[0].asked
    with pytest.raises(UsageError, match="--until-layer 5: --method full does not use it"):
        resolve(HealSettings(until_layer=5), SMALL)


def test_a_method_is_spelled_with_what_is_joined_to_it() -> None:
    for words, spelled in {"refit+lora": "refit+qlora", "distill+lora": "qlora+distill", "full": "qlora"}.items():
        settled, _ = resolve(HealSettings(method=words), REPAIRABLE)
        assert settled.spelled.format("qlora") == spelled
        find_method(spelled)


def test_an_option_that_no_way_of_quick_uses_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--kl 0.5: --method full does not use it. distill would"):
        resolve(HealSettings(kl=0.5), SMALL)


def test_quick_takes_what_the_model_allows_and_says_why() -> None:
    def no_experts(part: Any) -> None:
        if getattr(part, "targets", None) == "all":
            raise ModelError("the experts are fused. Use another method")

    settled, notes = resolve(HealSettings(), LARGE, no_experts)
    assert settled.to_data()["targets"] == "attention" and settled.method == "refit+lora"
    assert notes == ["refit+lora, --targets attention, since the experts are fused"]
    asked, none = resolve(HealSettings(method="lora", targets="all"), LARGE, no_experts)  # is refused where it is done
    assert asked.method == "lora" and not none

    def never(part: Any) -> None:
        raise ModelError(f"no {type(part).__name__}")

    with pytest.raises(ModelError, match=r"no Refit|no Lora"):
        resolve(HealSettings(), LARGE, never)


def _blocks(data: DataSettings, tokenizer: Any, **given: Any) -> Blocks:
    values = {"train": 20, "blocks": 6, "length": 32, "seed": 0, "default": "c4", "eval_data": None} | given
    apart = {key: values[key] for key in ("blocks", "length", "default", "eval_data")}
    rest = {key: values[key] for key in ("train", "length", "seed", "default")}
    return read_blocks(data, tokenizer, read_held_out(data, tokenizer, **apart), **rest)


def _demo_blocks(tokenizer: Any, **given: Any) -> Blocks:
    return _blocks(DataSettings(), tokenizer, default="demo", **given)


def test_blocks_are_full_and_hold_no_padding(tokenizer: Any) -> None:
    blocks = _demo_blocks(tokenizer)
    assert blocks.train.shape == (20, 32) and blocks.held_out.shape == (6, 32)
    assert tokenizer.pad_token_id not in blocks.train


def test_held_out_blocks_are_the_same_for_every_seed(tokenizer: Any) -> None:
    one, two = _demo_blocks(tokenizer), _demo_blocks(tokenizer, seed=1)
    assert np.array_equal(one.held_out, two.held_out) and not np.array_equal(one.train, two.train)


def _lines(path: Path, texts: Iterator[str] | list[str]) -> str:
    path.write_text("\n\n".join(texts))
    return str(path)


def test_a_document_is_held_out_or_trains_but_never_both(tmp_path: Path, tokenizer: Any) -> None:
    texts = [f"number {i} is {i * 7919} and {i * 104729}" for i in range(200)]
    file = _lines(tmp_path / "a.txt", texts * 2)
    blocks = _blocks(DataSettings(data=file), tokenizer, train=50, blocks=5)
    held, trained = (tokenizer.decode(part.ravel()) for part in (blocks.held_out, blocks.train))
    inside = [text for text in texts if text in held]
    assert len(inside) > 3 and not [text for text in inside if text in trained]


def test_leaking_evaluation_text_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    train = _lines(tmp_path / "train.txt", [f"a line about {i} and about {i + 1}" for i in range(100)])
    held = _lines(
        tmp_path / "held.txt", [f"quite another {i} with {i + 5}" for i in range(40)] + ["a line about 7 and about 8"]
    )
    with pytest.raises(DataError, match="also in the training text: 'a line about 7"):
        _blocks(DataSettings(data=train), tokenizer, train=500, blocks=500, length=16, eval_data=held)
    data = DataSettings(data=train)
    held_out = read_held_out(data, tokenizer, blocks=500, length=16, default="c4", eval_data=held)
    written = read_blocks(data, tokenizer, held_out, train=500, length=16, seed=0, default="c4", written=True)
    assert "a line about 7 and about 8" not in tokenizer.decode(written.train.ravel())


def test_few_long_documents_leave_some_to_train_on(tmp_path: Path, tokenizer: Any) -> None:
    texts = [f"document {i}: " + " ".join(str(i * j) for j in range(60)) for i in range(1, 31)]
    blocks = _blocks(DataSettings(data=_lines(tmp_path / "a.txt", texts)), tokenizer, blocks=2, train=20)
    assert len(blocks.train) == 20 and len(blocks.held_out) == 2


def test_too_little_text_is_said(tmp_path: Path, tokenizer: Any) -> None:
    file = _lines(tmp_path / "a.txt", ["just this"])
    with pytest.raises(DataError, match="does not fill one block"):
        _blocks(DataSettings(data=file), tokenizer, length=64)
