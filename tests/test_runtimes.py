"""Which runtimes would run a cut rightly: the rules, the command, and choosing only among such cuts."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lmprune.choosing import choose, write_recipe
from lmprune.cli import app
from lmprune.criteria import OWN
from lmprune.cuts.beside import Beside
from lmprune.cuts.patch import Patch
from lmprune.cuts.plan import Plan
from lmprune.errors import PlanError, UsageError
from lmprune.healing.writing import write_checkpoint
from lmprune.models.cut import open_cut
from lmprune.models.fields import pruned_config
from lmprune.models.fitting import fits, nearest_fitting
from lmprune.models.runtimes import RUNTIMES, check, document, parse_runtimes
from lmprune.models.serving import check_cut
from lmprune.profiling.settings import ProfileSettings
from lmprune.text.sources import DataSettings
from lmprune.writing.pruning import prune

S, F = "sliding_attention", "full_attention"


def config(kind: str, layers: int = 12, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = transformers.CONFIG_MAPPING[kind](num_hidden_layers=layers, **more).to_dict()
    return found


@pytest.mark.parametrize(
    ("kind", "kept", "verdicts", "layers"),
    [
        # transformers, vllm, llama.cpp, mlx; the layers that llama.cpp takes for others
        ("llama", (0, 1, 5, 7), "right right right right", ()),
        ("gemma3_text", (*range(6), 7, 8, 9), "right right right right", ()),
        ("gemma3_text", (0, 1, 4, 5, 6, 11), "right right wrong wrong", (3,)),
        ("gemma2", (0, 1, 6, 7), "right right right right", ()),
        ("gemma2", (0, 2, 3, 5), "right right wrong right", (1, 2)),
        ("smollm3", (0, 1, 2, 7, 8), "right right right right", ()),
        ("smollm3", (0, 1, 3, 4), "right right wrong right", (2, 3)),
        ("gpt_oss", (0, 3, 4, 5), "right right right right", ()),
        ("gpt_oss", (0, 2, 3, 5), "right wrong wrong right", (1, 2)),
        ("olmo3", (0, 3, 4, 5, 7), "right right wrong right", (1, 3, 4)),
        ("exaone4", (0, 1, 2, 3), "right right wrong right", (0, 1, 2)),
        ("qwen3_next", (0, 1, 3, 4), "right right right wrong", ()),
        ("xglm", (0, 1), "right unknown unknown unknown", ()),
    ],
)
def test_verdicts(kind: str, kept: tuple[int, ...], verdicts: str, layers: tuple[int, ...]) -> None:
    found = check(pruned_config(config(kind), kept))
    assert [verdict.runtime for verdict in found] == list(RUNTIMES)
    assert [verdict.verdict for verdict in found] == verdicts.split()
    assert found[2].layers == layers
    assert all(verdict.evidence for verdict in found if verdict.verdict != "unknown")


def test_a_key_that_mends_it_is_named() -> None:
    (gemma,) = check(pruned_config(config("gemma2"), (0, 2, 3, 4, 6, 7)), ["llama.cpp"])
    assert gemma.keys == {"gemma2.attention.sliding_window_pattern": 3} and "lmprune export" in gemma.why
    (all_full,) = check(pruned_config(config("gemma2"), (1, 3, 5)), ["llama.cpp"])
    assert all_full.keys == {"gemma2.attention.sliding_window_pattern": 1}
    (hybrid,) = check(pruned_config(config("qwen3_next"), (0, 1, 3, 4)), ["llama.cpp"])
    assert hybrid.keys == {"qwen3next.attention.recurrent_layers": [True, True, False, True]}


def test_sizes_that_a_runtime_computes_are_rules_too() -> None:
    odd = check(config("qwen2", head_dim=96), ["vllm", "llama.cpp", "mlx"])
    assert [(verdict.verdict, verdict.loads) for verdict in odd] == [("wrong", False)] * 3
    assert "4096 / 32 = 128" in odd[0].why and "32 of 96 are not 4096" in odd[1].why
    assert odd[0].of("it") == (
        "vllm cannot run it: it takes 4096 / 32 = 128 for the size of a head, which is 96, so that it will not load. "
        "Narrow its MLPs or drop layers instead"
    )
    mixed = config("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=4)
    assert "will not load" in check(mixed, ["vllm"])[0].why
    # Gemma 2 27B: its scale of attention is 144, and a head is of 128, which llama.cpp tells by the 46 layers.
    big = config("gemma2", 46, hidden_size=4608, num_attention_heads=32, head_dim=128, query_pre_attn_scalar=144)
    assert check(big, ["llama.cpp"])[0].verdict == "right"
    (cut,) = check(pruned_config(big, range(44)), ["llama.cpp"])
    assert cut.verdict == "wrong" and "at 44 layers divides attention by the root of 128, and not of 144" in cut.why
    lite = config("deepseek_v2", 27, q_lora_rank=None, first_k_dense_replace=1)
    assert [check(pruned_config(lite, range(n)), ["llama.cpp"])[0].verdict for n in (27, 26, 25)] == [
        *("right", "right", "wrong")
    ]


@pytest.mark.parametrize(
    ("kind", "verdicts"),
    [
        # What a smaller hidden size leaves: heads that are wider together than the model.
        ("llama", "right right right right"),
        ("qwen2", "right wrong wrong wrong"),
        ("qwen3", "right right right right"),
        ("phi3", "right right wrong wrong"),
        ("granite", "right right wrong wrong"),
        ("gemma", "right right right right"),
        ("mixtral", "right right right wrong"),
    ],
)
def test_narrowed_models(kind: str, verdicts: str) -> None:
    found = check(config(kind, hidden_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=32))
    assert [verdict.verdict for verdict in found] == verdicts.split()


def test_weights_in_few_bits_are_for_those_that_read_them() -> None:
    def of(method: str) -> list[str]:
        return [verdict.verdict for verdict in check(config("llama", quantization_config={"quant_method": method}))]

    assert of("bitsandbytes") == ["right", "wrong", "wrong", "wrong"]
    assert of("gptq") == ["right"] * 4 and of("aqlm") == ["right", "wrong", "wrong", "wrong"]
    old = config("llama", quantization_config={"load_in_4bit": True})
    for verdict, advice in zip(check(old, ["vllm", "llama.cpp", "mlx"]), ("vllm serve", "llama-quantize", "mlx_lm")):
        assert "cannot read weights that bitsandbytes quantised" in verdict.why and not verdict.loads
        assert advice in verdict.advice and verdict.evidence


def test_mlx_does_not_look_into_rope_parameters() -> None:
    def mlx(kind: str, stored: dict[str, Any] | None, **rope: Any) -> Any:
        (found,) = check(config(kind, rope_parameters={"rope_type": "default", **rope}), ["mlx"], stored)
        return found

    new = mlx("llama", {}, rope_theta=500000.0)
    assert new.verdict == "wrong" and new.loads and "takes 10000 for the rotary base, which is 500000" in new.why
    assert mlx("llama", {"rope_theta": 500000.0}, rope_theta=500000.0).verdict == "right"
    assert mlx("llama", {}, rope_theta=10000.0).verdict == "right", "its own default"
    assert mlx("llama", None, rope_theta=500000.0).verdict == "right", "as lmprune writes it"
    scaled = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}
    assert "are not scaled" in mlx("llama", {}, **scaled).why
    old = {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert mlx("llama", old, **scaled).verdict == "right"
    needed = mlx("glm4", {}, rope_theta=10000.0)
    assert needed.verdict == "wrong" and not needed.loads and "config.json has no rope_theta" in needed.why
    assert mlx("qwen3", {}, rope_theta=500000.0).verdict == "right", "reads both"


def test_mlx_reads_the_base_of_sliding_layers_beside_the_others_too() -> None:
    def mlx(kind: str, stored: dict[str, Any] | None, full: float, sliding: float) -> Any:
        bases = {"full_attention": full, "sliding_attention": sliding}
        rope = {name: {"rope_type": "default", "rope_theta": base} for name, base in bases.items()}
        return check(config(kind, rope_parameters=rope), ["mlx"], stored)[0]

    assert mlx("gemma3_text", {}, 1e6, 1e4).verdict == "right", "its own defaults"
    other = mlx("gemma3_text", {}, 1e6, 5e4)
    assert other.verdict == "wrong" and "takes 10000 for the rotary base of sliding layers, which is 50000" in other.why
    assert mlx("gemma3_text", {"rope_local_base_freq": 5e4}, 1e6, 5e4).verdict == "right"
    assert mlx("gemma3_text", None, 1e6, 5e4).verdict == "right", "as lmprune writes it"
    alike = mlx("olmo3", {"rope_theta": 5e5}, 5e5, 1e4)
    assert alike.verdict == "wrong" and "takes 500000 for the rotary base of sliding layers" in alike.why
    assert not alike.advice, "no field of that runtime says it"


def test_what_a_runtime_needs_of_the_layers_left() -> None:
    few = pruned_config(config("gemma3_text"), (0, 1, 2))
    (verdict,) = check(few, ["mlx"])
    assert not verdict.loads and "fewer than 6 layers" in verdict.why
    (alike,) = check(pruned_config(config("gpt_oss"), (0, 2)), ["mlx"])
    assert not alike.loads and "without a layer of full_attention" in alike.why
    (gone,) = check(config("mpt"), ["vllm"])
    assert gone.verdict == "wrong" and "no such family since 0.28.0" in gone.why


def test_the_document_is_the_table() -> None:
    assert (Path(__file__).parent.parent / "docs" / "runtimes.md").read_text() == document()


def test_a_runtime_that_is_not_known() -> None:
    assert parse_runtimes(None) == RUNTIMES and parse_runtimes("mlx, vllm") == ("mlx", "vllm")
    with pytest.raises(UsageError, match=r"--runtime 'llamacpp' is not known \(did you mean 'llama.cpp'\?\)"):
        parse_runtimes("vllm,llamacpp")


@pytest.mark.parametrize("kind", ["gemma3_text", "gemma2", "smollm3"])
@pytest.mark.parametrize("dropped", [(7, 8), (3, 4, 9), (0, 5, 10, 11)])
def test_the_nearest_plans_are_those_of_all_that_fit(kind: str, dropped: tuple[int, ...]) -> None:
    whole, plan = config(kind), Plan(12, dropped)
    every = [Plan(12, gone) for gone in combinations(range(12), len(dropped)) if 2 not in gone]
    right = [other for other in every if fits(whole, other, "llama.cpp")]
    common = [len({*other.dropped} & {*dropped}) for other in right]
    found = nearest_fitting(whole, plan, "llama.cpp", {2}, most=5)
    assert set(found) <= set(right)
    assert sorted((len({*p.dropped} & {*dropped}) for p in found), reverse=True) == sorted(common, reverse=True)[:5]


def test_no_plan_fits() -> None:
    big = config("gemma2", 46, hidden_size=4608, num_attention_heads=32, head_dim=128, query_pre_attn_scalar=144)
    with pytest.raises(PlanError, match=r"no cut of 4 of 46 layers keeps .* Leave --runtime llama.cpp out"):
        nearest_fitting(big, Plan(46, (1, 2, 3, 4)), "llama.cpp")


def test_what_is_written_names_rope_theta(tiny: Callable[..., Path], tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    base = tiny("llama", rope_parameters=rope)
    assert check_cut(open_cut(base), ["mlx"])[0].verdict == "wrong", "transformers writes rope_parameters alone"
    write_recipe(open_cut(base), Plan(8, (2, 3)), tmp_path / "r.yml")
    assert check_cut(open_cut(tmp_path / "r.yml"), ["mlx"])[0].verdict == "right"
    for writer in ("copy", "mergekit"):
        prune(tmp_path / "r.yml", tmp_path / writer, writer=writer, logits=False)
    ids = torch.arange(12)[None]
    model = open_cut(tmp_path / "copy").load()
    write_checkpoint(model, tmp_path / "copy", ids, tmp_path / "healed")
    for made in ("copy", "mergekit", "healed"):
        written = json.loads((tmp_path / made / "config.json").read_text())
        assert written["rope_theta"] == 500000.0
        found = open_cut(tmp_path / made)
        assert check_cut(found, ["mlx"])[0].verdict == "right" and found.config["rope_parameters"] == rope
    bases = {"full_attention": 1e6, "sliding_attention": 5e4}
    both = {name: {"rope_type": "default", "rope_theta": value} for name, value in bases.items()}
    write_recipe(open_cut(tiny("gemma3_text", rope_parameters=both)), Plan(8, (2,)), tmp_path / "sliding.yml")
    prune(tmp_path / "sliding.yml", tmp_path / "sliding", logits=False)
    written = json.loads((tmp_path / "sliding" / "config.json").read_text())
    assert (written["rope_theta"], written["rope_local_base_freq"]) == (1e6, 5e4)
    assert open_cut(tmp_path / "sliding").config["rope_parameters"] == both
    other = tiny("qwen3")
    write_recipe(open_cut(other), Plan(8, (2, 3)), tmp_path / "other.yml")
    prune(tmp_path / "other.yml", tmp_path / "other", logits=False)
    assert "rope_theta" not in json.loads((tmp_path / "other" / "config.json").read_text()), "nobody needs it"


def test_a_patch_is_for_lmprune_alone(tiny: Callable[..., Path], tmp_path: Path) -> None:
    part = Patch(Beside("0" * 64, "p.safetensors", tmp_path), (1,), "linear-patch")
    cut = open_cut(tiny("llama")).without(Plan(8, (2, 3), (part,)), "patched")
    found = check_cut(cut)
    assert {verdict.verdict for verdict in found} == {"wrong"}
    assert (
        found[0]
        .of("it")
        .startswith(
            "transformers would run another model than it: it does not know a linear-patch patch after 1, which lmprune"
        )
    )


def test_what_no_cut_can_mend_is_said(tiny: Callable[..., Path], tmp_path: Path) -> None:
    packed = config("llama", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(PlanError, match=r"llama.cpp cannot run this model: it cannot read weights that bitsandbytes"):
        nearest_fitting(packed, Plan(12, (3,)), "llama.cpp")
    odd = tiny("qwen2", hidden_size=48, head_dim=16)
    with pytest.raises(PlanError, match=r"takes 48 / 4 = 12 for the size of a head, .*Dropping layers does not change"):
        app.run(["recipe", str(odd), "--layers", "2", "--runtime", "vllm", "-o", str(tmp_path / "r.yml")])


@pytest.fixture
def gemma(tiny: Callable[..., Path]) -> Path:
    return tiny(
        "gemma3_text", head_dim=16, query_pre_attn_scalar=16, layer_types=[S, S, S, S, S, F, S, S], sliding_window=16
    )


QUICK = ProfileSettings(samples=8, max_length=32, device="cpu")


@pytest.mark.parametrize(
    "criterion", ["deepest", *(pytest.param(n, marks=pytest.mark.slow) for n in OWN if n != "deepest")]
)
def test_criteria_choose_what_the_runtime_runs(gemma: Path, criterion: str, one_thread: None) -> None:
    whole = open_cut(gemma)
    free = choose(whole, criterion, drop=3, settings=QUICK, data=DataSettings(data="demo"))
    if free.plan.parts and not fits(whole.config, free.plan, "llama.cpp"):
        with pytest.raises(PlanError, match="cuts of sublayers are not mended"):
            choose(whole, criterion, drop=3, settings=QUICK, data=DataSettings(data="demo"), runtime="llama.cpp")
        return
    made = choose(whole, criterion, drop=3, settings=QUICK, data=DataSettings(data="demo"), runtime="llama.cpp")
    assert fits(whole.config, made.plan, "llama.cpp") and made.criterion == criterion
    if fits(whole.config, free.plan, "llama.cpp"):
        assert made.plan == free.plan
    else:
        assert made.details["runtime"]["instead_of"] == list(free.plan.dropped)
        assert "nats a token on unseen text" in made.reason


def test_the_command(gemma: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "bad.yml"
    write_recipe(open_cut(gemma), Plan(8, (0, 1, 2, 3)), recipe)
    assert app.run(["check", str(recipe), "--json"]) == 3
    verdicts = json.loads(capsys.readouterr().out)["rows"]
    assert [(v["runtime"], v["layers"]) for v in verdicts if v["verdict"] == "wrong"] == [
        *(("llama.cpp", [1]), ("mlx", [1]))
    ]
    assert app.run(["check", str(recipe), "--runtime", "llama.cpp"]) == 3
    said = " ".join(capsys.readouterr().out.split())
    assert "of the base: 5" in said and "Choose the layers again with `lmprune recipe --runtime`" in said
    assert app.run(["check", str(gemma)]) == 0


def test_a_runtime_reads_text_where_the_criterion_reads_none(gemma: Path, tmp_path: Path, one_thread: None) -> None:
    words = ["recipe", str(gemma), "--drop", "4", "--criterion", "deepest", "--no-check", "-o", str(tmp_path / "r.yml")]
    text = ["--data", "demo", "--samples", "4", "--max-length", "32"]
    with pytest.raises(UsageError, match="--criterion deepest reads no text"):
        app.run([*words, *text])
    assert app.run([*words, *text, "--runtime", "llama.cpp"]) == 0
    assert app.run(["check", str(tmp_path / "r.yml"), "--runtime", "llama.cpp"]) == 0


@pytest.mark.slow
def test_prune_says_it(gemma: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    write_recipe(open_cut(gemma), Plan(8, (0, 1, 2, 3)), tmp_path / "bad.yml")
    done = run("lmprune", "prune", "bad.yml", "bad", "--no-logits")
    assert "llama.cpp would run another model than this: it takes every 6th layer to be full attention" in done.stderr
    assert "of the base: 5" in " ".join(run("lmprune", "check", "bad", code=3).stdout.split())


@pytest.mark.slow
def test_recipe_with_a_runtime(gemma: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    words = ("lmprune", "recipe", gemma, "-o", "r.yml", "--runtime", "llama.cpp")
    refused = run(*words, "--layers", "2,3", code=2)
    assert "llama.cpp would run another model" in refused.stderr
    assert "did you mean 'llama.cpp'" in run(*words[:-1], "lama.cpp", "--drop", 2, code=2).stderr
    sizes = ("--data", "demo", "--samples", 8, "--max-length", 32, "--device", "cpu")
    run(*words, "--drop", 3, "--criterion", "deepest", *sizes)
    run("lmprune", "check", "r.yml", "--runtime", "llama.cpp")
