"""Speed and memory: what is counted is right, and what is timed is timed as promised."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmprune.benching.measuring import Subject, bench, measure
from lmprune.benching.rows import Ratio
from lmprune.benching.settings import BenchSettings
from lmprune.choosing import write_recipe
from lmprune.cuts.plan import Plan
from lmprune.errors import UsageError
from lmprune.models.cut import open_cut
from lmprune.models.loading import load_model

QUICK = BenchSettings(prompts="8", batch_sizes="1,2", tokens=2, warmup=1, device="cpu")


@pytest.fixture(scope="module")
def recipe(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, path = tiny("llama"), tmp_path_factory.mktemp("bench") / "cut.yml"
    write_recipe(open_cut(base), Plan(8, (3, 4)), path)
    return path


def test_counts_and_ratios(tiny: Callable[..., Path], recipe: Path) -> None:
    base = tiny("llama")
    done = measure([Subject.of(base), Subject.of(recipe)], QUICK)
    assert [(row.name, row.batch_size) for row in done.rows] == [(base.name, 1), ("cut", 1), (base.name, 2), ("cut", 2)]
    whole, cut = done.rows[:2]
    model = load_model(base)
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    heads = model.model.layers[0].self_attn.q_proj.out_features
    assert whole.parameters - cut.parameters == 2 * layer
    assert whole.weight_bytes - cut.weight_bytes == 2 * 2 * layer
    # The head is read for every token, and of the embedding one row.
    read = 8 * layer + 64 + 320 * 64
    assert (whole.layers, cut.layers, whole.ideal, cut.ideal) == (8, 6, 1.0, pytest.approx(read / (read - 2 * layer)))
    matrices = 8 * (layer - 2 * 48) + 320 * 48
    # Two operations a weight; and two products with keys and values, of which torch counts the causal half.
    assert whole.flops_per_token == pytest.approx(2 * matrices + 8 * 2 * 8 * heads, rel=0.02)
    assert whole.decode_ratio == Ratio(1.0, 1.0, 1.0)
    for row in done.rows:
        assert 0 < row.prefill_p50 <= row.prefill_p90 and 0 < row.decode_p50 <= row.decode_p90
        assert row.decode_ratio.low <= row.decode_ratio.median <= row.decode_ratio.high
        assert row.peak_bytes is None or row.peak_bytes >= row.weight_bytes
        assert row.decode_tokens_per_second > 0 and row.joules_per_token is None


def test_warm_up_is_discarded_and_models_take_turns(
    tiny: Callable[..., Path], recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    order: list[int] = []
    clock = [0.0]
    real = LlamaForCausalLM.forward

    def forward(self: Any, input_ids: Any, **how: Any) -> Any:
        if input_ids.shape[1] == 4:
            order.append(self.config.num_hidden_layers)
        clock[0] += 100 if len(order) <= 4 else 1  # two models, warmed up twice
        return real(self, input_ids=input_ids, **how)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    asked = BenchSettings(prompts="4", batch_sizes="1", tokens=2, warmup=2, device="cpu")
    rows = measure([Subject.of(tiny("llama")), Subject.of(recipe)], asked).rows
    assert order[:24] == [8, 6, 6, 8] * 6
    assert [(row.prefill_p90, row.decode_p90) for row in rows] == [(1, 1), (1, 1)]


def test_a_cut_with_an_adapter_is_measured_as_the_cut_is(
    tiny: Callable[..., Path], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft
    from transformers import LlamaForCausalLM

    adapter = tmp_path / "adapter-0.1"
    peft.get_peft_model(open_cut(recipe).load(), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        adapter
    )
    kept: set[object] = set()
    real = LlamaForCausalLM.forward

    def forward(self: Any, input_ids: Any, **how: Any) -> Any:
        if how.get("use_cache") and input_ids.shape[1] == 8:
            kept.add(how.get("logits_to_keep"))
        return real(self, input_ids=input_ids, **how)

    forward.__signature__ = inspect.signature(real)  # type: ignore[attr-defined]
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    cut, repaired = bench([recipe, f"{recipe}+{adapter}"], replace(QUICK, batch_sizes="1")).rows
    assert (cut.name, repaired.name) == ("cut", "cut+adapter-0.1") and cut.layers == repaired.layers == 6
    assert repaired.parameters - cut.parameters == 6 * 2 * (64 + 64)
    assert kept == {1}, "the head is run on the last position alone, with an adapter too"


def test_quantised_rows_are_smaller_and_count_the_same_parameters(tiny: Callable[..., Path]) -> None:
    asked = BenchSettings(prompts="4", batch_sizes="1", tokens=2, warmup=1, device="cpu", quantizations="nf4")
    plain, small = measure([Subject.of(tiny("llama"))], asked).rows
    assert small.name.endswith(" nf4") and small.quantization == "nf4"
    assert small.weight_bytes < plain.weight_bytes and small.parameters == plain.parameters
    assert small.flops_per_token == plain.flops_per_token


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"runs": 0}, "--runs 0: give a number from 1"),
        ({"warmup": 0}, "--warmup 0"),
        ({"tokens": 1}, "--tokens 1"),
        ({"prompts": "8,16,8"}, "--prompts '8,16,8': a number stands twice"),
        ({"quantizations": "nf5"}, "--quantizations 'nf5'"),
        ({"prompts": "8,x"}, "--prompts '8,x'"),
        ({"batch_sizes": "0"}, "--batch-sizes '0'"),
    ],
)
def test_bad_settings(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        BenchSettings(**options)


def test_mistakes(tiny: Callable[..., Path]) -> None:
    base = Subject.of(tiny("llama"))
    with pytest.raises(UsageError, match="pass the window"):
        measure([base], BenchSettings(prompts="600", batch_sizes="1", device="cpu"))
    with pytest.raises(UsageError, match="two models are called"):
        measure([base, base], QUICK)


@pytest.mark.slow
def test_the_command_compares_a_recipe_with_its_base(run: Callable[..., Any], recipe: Path, tmp_path: Path) -> None:
    words = (
        "lmprune",
        "bench",
        recipe,
        "--prompts",
        8,
        "--batch-sizes",
        1,
        "--tokens",
        2,
        "--device",
        "cpu",
        "--quantizations",
        "nf4,int8",
        "-o",
        "b.json",
    )
    done = run(*words)
    assert "ideal" in done.stdout and "cut int8" in done.stdout
    data = json.loads((tmp_path / "b.json").read_text())
    assert data["format"] == "lmprune-bench" and len(data["rows"]) == 6 and data["versions"]["torch"]


def test_a_model_in_few_bits_alone_has_its_parameters_and_no_count_of_operations(tiny: Any) -> None:
    asked = BenchSettings(prompts="8", batch_sizes="1", tokens=2, device="cpu")
    whole = open_cut(tiny("llama"))
    (plain, few) = measure([Subject("whole", whole), Subject("any name", whole, "nf4")], asked).rows
    assert few.parameters == plain.parameters and few.flops_per_token == plain.flops_per_token
    assert few.weight_bytes < plain.weight_bytes
    (alone,) = measure([Subject("alone", whole, "nf4")], asked).rows
    assert alone.parameters == plain.parameters and alone.flops_per_token is None


def test_the_usual_prompts_are_those_that_fit() -> None:
    assert BenchSettings().lengths(None) == [128, 512]
    assert BenchSettings(tokens=32).lengths(512) == [128]
    assert BenchSettings(tokens=32).lengths(100) == [68]
    assert BenchSettings(prompts="7,9").lengths(8) == [7, 9]


def test_few_runs_are_a_trial(tiny: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    from lmprune.benching.measuring import bench

    with caplog.at_level("INFO", "lmprune"):
        done = bench(
            str(tiny("llama")), BenchSettings(runs=2, warmup=1, prompts="8", batch_sizes="1", tokens=2, device="cpu")
        )
    assert len(done.rows) == 1 and "give no spread" in caplog.text


def test_memory_that_the_cpu_does_not_give_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch has no class of its own for it there."""
    from lmprune.benching import measuring
    from lmprune.errors import HostError

    def full(*args: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(measuring, "_load", full)
    with pytest.raises(HostError, match="out of memory on cpu with 1 models"):
        measuring.bench("demo", BenchSettings(device="cpu"))
