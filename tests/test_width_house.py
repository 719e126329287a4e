"""A recipe of width goes the way of every recipe: written, proven, evaluated, healed, quantised, shared."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_cli import invoke
from test_evaluation import TASKS, _numbers, _results
from widths import some_neurons, source_of

from lmprune.choosing import write_recipe
from lmprune.cuts.lineage import Lineage
from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe
from lmprune.errors import LmpruneError, ModelError, OutputError, RecipeError, UsageError
from lmprune.forward.loss import losses
from lmprune.forward.machine import weights_bytes
from lmprune.forward.streaming import StreamedModel
from lmprune.healing import heal
from lmprune.healing.keeping import Kept
from lmprune.healing.settings import HealSettings
from lmprune.models import in_files
from lmprune.models.cut import open_cut
from lmprune.models.width import width_of
from lmprune.text.sources import DataSettings
from lmprune.text.tokens import Tokens
from lmprune.writing.pruning import prune
from lmprune.writing.verify import verify

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS, WIDTH, NEURONS = 8, 64, 128
DEMO = DataSettings(data="demo")
SHORT: dict[str, Any] = {"steps": 2, "batch_size": 2, "max_length": 32, "eval_blocks": 2, "eval_every": 1}


def width(folder: Path, *, ffn: bool = True, hidden: int | None = 48, groups: int | None = 1) -> Any:
    """A part of width with random choices, for a tiny model in ``folder``."""
    held: dict[str, Any] = {}
    size = None
    if ffn:
        held, size = some_neurons(source_of(folder), 0.75)
    if groups is not None:
        held |= {f"groups.{layer}": torch.tensor([layer % 2]).int() for layer in range(LAYERS)}
    if hidden is not None:
        noise = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
        held["rotation"] = torch.linalg.qr(noise)[0][:, :hidden]
    return width_of(held, ffn=size, hidden=hidden, groups=groups)


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``r.yml``, a tiny Llama without two layers and narrower in every way, and ``out`` of it."""
    folder, base = tmp_path_factory.mktemp("width"), tiny("llama", tie_word_embeddings=True)
    write_recipe(base, Plan(LAYERS, (2, 5), (width(base),)), folder / "r.yml")
    prune(folder / "r.yml", folder / "out")
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.arange(2, 42).view(2, 20)).logits.float()
    return found


def test_the_checkpoint_is_stock_and_the_live_cut(made: Path) -> None:
    from transformers import AutoModelForCausalLM

    live, written = open_cut(made / "r.yml"), AutoModelForCausalLM.from_pretrained(made / "out").eval()
    assert type(written) is type(live.load()) and torch.equal(logits(written), logits(live.load()))
    config = json.loads((made / "out" / "config.json").read_text())
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert [config[name] for name in (*names, "head_dim")] == [48, 96, 6, 2, 1, 16]
    assert config["rms_norm_eps"] == pytest.approx(1e-6 * 64 / 48)
    assert sorted(path.name for path in (made / "out").glob("*.safetensors")) == ["model.safetensors"], "weights alone"
    told = Lineage.read(made / "out")
    assert told is not None and told.plan == live.plan and told.proof is not None and not told.proof["differences"]
    assert open_cut(made / "out").origin.plan == live.plan
    assert weights_bytes(live, 2) == 2 * sum(p.numel() for p in written.parameters())


def test_the_recipe_says_it_and_goes_with_its_file(made: Path, tmp_path: Path) -> None:
    text = (made / "r.yml").read_text()
    assert "narrows the FFN to 96 neurons, the hidden size to 48, attention to 1 key-value group" in text
    assert "mergekit-yaml" not in text and "base_model" not in text
    data = yaml.safe_load(text)
    told = data["lmprune"]["parts"]["width"]
    assert data["merge_method"] == "lmprune" and (told["ffn"], told["hidden"], told["groups"]) == (96, 48, 1)
    for name in ("r.yml", told["file"]):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    moved = open_cut(tmp_path / "r.yml")
    assert moved.plan == open_cut(made / "r.yml").plan and torch.equal(
        logits(moved.load()), logits(open_cut(made / "out").load())
    )
    assert verify(made / "out" / "recipe.yml", made / "out").differences == ()


def test_mergekit_refuses_it(made: Path, tmp_path: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge_methods import get as method

    with pytest.raises(RuntimeError, match="lmprune"):
        method(MergeConfiguration.model_validate(yaml.safe_load((made / "r.yml").read_text())).merge_method)
    with pytest.raises(UsageError, match="mergekit cannot cut the FFN to 96 neurons"):
        prune(made / "r.yml", tmp_path / "out", writer="mergekit")


def test_what_was_written_otherwise_is_seen(made: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(made / "out", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3] *= 1.02
    save_file(weights, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    (found,) = verify(made / "r.yml", tmp_path / "out", logits=False).differences
    assert found == "model.layers.1.mlp.up_proj.weight is not what its part of the plan makes of it"


def test_another_machines_rounding_is_no_difference(made: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(made / "out", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    row = weights["model.layers.1.mlp.up_proj.weight"]
    row[3, :1] = (row[3, :1].view(torch.int16) + 1).view(torch.bfloat16)
    save_file(weights, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    proof = verify(made / "r.yml", tmp_path / "out")
    assert proof.differences == () and (proof.largest_logit_difference or 0) > 0


@pytest.mark.slow
def test_lm_eval_hf_on_the_written_model_equals_lmprune_on_the_recipe(
    made: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    model = f"pretrained={open_cut(made / 'r.yml').base.path},recipe={made / 'r.yml'}"
    run("lm_eval", "--model", "lmprune", "--model_args", model, "--output_path", tmp_path / "a", *TASKS)
    run(
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={made / 'out'}",
        "--output_path",
        tmp_path / "b",
        *TASKS,
    )
    ours, theirs = _results(tmp_path / "a"), _results(tmp_path / "b")
    assert _numbers(ours) == _numbers(theirs) and len(_numbers(ours)) >= 4


def test_views_of_several_widths_are_each_their_own_model(made: Path, tiny: Callable[..., Path]) -> None:
    base = open_cut(tiny("llama", tie_word_embeddings=True))
    cut = open_cut(made / "r.yml")
    plans = [Plan(LAYERS), cut.plan or Plan(LAYERS), Plan(LAYERS, (2,)), Plan(LAYERS, (), (width(base.base.path),))]
    tokens = Tokens(tuple(torch.randint(4, 300, (n,)).int().numpy() for n in (20, 9)))
    model = base.load(dtype="float32")
    together = losses(model, plans, tokens, progress=False).values
    apart = losses(model, plans, tokens, share=False, progress=False).values
    assert (together == apart).all() and len({round(float(value), 6) for value in together.mean(1)}) == 4


@pytest.mark.parametrize("method", ["full+distill", pytest.param("lora", marks=pytest.mark.slow)])
def test_healing_starts_from_it_as_from_any_cut(made: Path, tmp_path: Path, method: str) -> None:
    done = heal(made / "r.yml", tmp_path / "out", HealSettings(method=method, **SHORT), DEMO)
    healed, told = open_cut(tmp_path / "out"), Lineage.read(tmp_path / "out")
    assert (healed.whole_config.hidden_size, healed.whole_config.intermediate_size, healed.layers) == (48, 96, 6)
    assert told is not None and told.plan == open_cut(made / "r.yml").plan and told.healed
    assert healed.origin.plan == told.plan and done.original is not None and done.healed < 100
    assert logits(healed.load()).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "last-layers", "distill", "full+distill"])
def test_every_way_to_train_it(made: Path, tmp_path: Path, method: str) -> None:
    for source in ("r.yml", "out"):
        heal(made / source, tmp_path / source / "out", HealSettings(method=method, **SHORT), DEMO)
        assert open_cut(tmp_path / source / "out").whole_config.hidden_size == 48


def test_states_of_another_size_cannot_be_compared(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--aux: the narrowed model's hidden state has another size"):
        heal(made / "r.yml", tmp_path / "out", HealSettings(method="full+distill", aux=1.0, **SHORT), DEMO)


@pytest.mark.slow
def test_an_adapter_belongs_to_the_width_that_it_was_trained_on(
    made: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    heal(made / "r.yml", tmp_path / "kept", HealSettings(method="lora", keep_adapter=True, **SHORT), DEMO)
    alone = open_cut(tmp_path / "kept")
    assert alone.plan == open_cut(made / "r.yml").plan and alone.adapter is not None
    base = tiny("llama", tie_word_embeddings=True)
    write_recipe(base, Plan(LAYERS, (2, 5), (width(base, hidden=None),)), tmp_path / "other.yml")
    assert torch.equal(logits(open_cut(f"{made / 'r.yml'}+{tmp_path / 'kept'}").load()), logits(alone.load()))
    with pytest.raises(ModelError, match="does not fit this model"):
        open_cut(f"{tmp_path / 'other.yml'}+{tmp_path / 'kept'}").load()


def test_a_narrowed_checkpoint_is_cut_again(made: Path, tmp_path: Path) -> None:
    live = write_recipe(made / "r.yml", Plan(6, (0,)), tmp_path / "again.yml")
    assert live.recipe.plan.dropped == (0, 2, 5)
    write_recipe(made / "out", Plan(6, (0,)), tmp_path / "written.yml")
    assert torch.equal(
        logits(open_cut(tmp_path / "again.yml").load()), logits(open_cut(tmp_path / "written.yml").load())
    )
    with pytest.raises(LmpruneError, match="cannot follow another"):
        write_recipe(made / "r.yml", Plan(6, (), (width(open_cut(made / "out").base.path),)), tmp_path / "no.yml")


def broken(made: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the recipe and of its file."""
    (file,) = made.glob("*.width.safetensors")
    for path in (made / "r.yml", file):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / "r.yml", tmp_path / file.name


def remove(path: Path) -> None:
    path.unlink()


def exchange(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\1")


@pytest.mark.parametrize(("spoil", "said"), [(remove, "does not exist. Copy it there"), (exchange, "does not fit its")])
def test_a_file_that_is_missing_or_another_is_one_line(
    made: Path, tmp_path: Path, spoil: Callable[[Path], None], said: str, capsys: Any, monkeypatch: Any
) -> None:
    recipe, file = broken(made, tmp_path)
    spoil(file)
    with pytest.raises(RecipeError, match=said) as raised:
        open_cut(recipe)
    assert "\n" not in str(raised.value)
    for command in (("prune", recipe, tmp_path / "out"), ("heal", recipe, tmp_path / "out")):
        code, _, err = invoke(capsys, monkeypatch, *command)
        assert code == 1 and said in err and err.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ffn": 0}, "width.ffn is 0"),
        ({"ffn": "96"}, "width.ffn is '96'"),
        ({"ffn": None, "hidden": None, "groups": None}, "names no size"),
        ({"ffm": 3}, "did you mean 'ffn'"),
        ({"file": "../other.width.safetensors"}, "give the plain name of a file beside the recipe"),
        ({"sha256": "abc"}, "64 hexadecimal digits"),
    ],
)
def test_wrong_data_of_a_width_are_one_line(made: Path, change: Any, said: str) -> None:
    data = yaml.safe_load((made / "r.yml").read_text())
    data["lmprune"]["parts"]["width"] |= change
    with pytest.raises(RecipeError, match=said):
        Recipe.from_data(data)


def test_a_quantised_base_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    from lmprune.writing.quantizing import QuantizeSettings, quantize

    base = tiny("llama", tie_word_embeddings=True)
    quantize(base, tmp_path / "q", "int8", QuantizeSettings(samples=0, device="cpu"))
    with pytest.raises(ModelError, match="a quantised model cannot be narrowed"):
        write_recipe(tmp_path / "q", Plan(LAYERS, (), (width(base),)), tmp_path / "r.yml")
    assert not (tmp_path / "r.yml").exists()


def test_it_is_quantised_after_it_was_narrowed(made: Path, tmp_path: Path) -> None:
    from lmprune.writing.quantizing import QuantizeSettings, quantize

    quantize(made / "r.yml", tmp_path / "q", "int8", QuantizeSettings(samples=0, device="cpu"))
    loaded = open_cut(tmp_path / "q")
    assert loaded.whole_config.hidden_size == 48 and logits(loaded.load()).isfinite().all()


def test_show_and_card_tell_it(made: Path, capsys: Any, monkeypatch: Any) -> None:
    for name in (made / "r.yml", made / "out"):
        _, said, _ = invoke(capsys, monkeypatch, "show", name)
        assert "narrows the FFN to 96 neurons" in " ".join(said.split())
        _, said, _ = invoke(capsys, monkeypatch, "show", name, "--json")
        assert json.loads(said)["parts"]["width"]["hidden"] == 48


def test_it_is_shared_with_its_file(made: Path, tmp_path: Path) -> None:
    from lmprune.sharing.pushing import push

    push(made / "r.yml", "ada/narrow", base="org/base", dry_run=tmp_path / "dry")
    (file,) = (tmp_path / "dry").glob("*.width.safetensors")
    card = (tmp_path / "dry" / "README.md").read_text()
    assert file.read_bytes() == next(made.glob("*.width.safetensors")).read_bytes()
    assert "the hidden size to 48" in card and "mergekit cannot carry out this cut" in card
    assert "mergekit-yaml" not in card and "tags: [lmprune, layer-pruning]" in card
    assert Recipe.read(tmp_path / "dry" / "recipe.yml").parts == open_cut(made / "r.yml").recipe.parts  # type: ignore[union-attr]
    push(made / "r.yml", "ada/narrow", base="org/base", weights=made / "out", dry_run=tmp_path / "whole")
    assert [p.name for p in (tmp_path / "whole").glob("*.safetensors")] == ["model.safetensors"]
    assert (tmp_path / "whole" / "lmprune" / file.name).is_file()


def test_the_check_of_runtimes_reads_sizes(
    made: Path, tiny: Callable[..., Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """A class that computes head_dim is wrong for a narrowed model; awkward sizes are said."""
    code, _, err = invoke(capsys, monkeypatch, "check", made / "r.yml", "--runtime", "vllm,llama.cpp")
    assert code == 0 and "K-quants pack 256 numbers of a row" in " ".join(err.split())
    base = tiny("qwen2")
    write_recipe(base, Plan(LAYERS, (), (width(base, ffn=False, groups=None),)), tmp_path / "r.yml")
    code, out, _ = invoke(capsys, monkeypatch, "check", tmp_path / "r.yml", "--runtime", "vllm", "--json")
    (verdict,) = json.loads(out)["rows"]
    assert (
        code == 3
        and verdict["why"] == "takes 48 / 4 = 12 for the size of a head, which is 16, so that it will not load"
    )


def test_speed_and_sizes_are_measured_of_it(made: Path, tiny: Callable[..., Path]) -> None:
    from lmprune.benching.measuring import Subject, measure
    from lmprune.benching.settings import BenchSettings

    quick = BenchSettings(prompts="8", batch_sizes="1", tokens=2, warmup=1, device="cpu")
    base = tiny("llama", tie_word_embeddings=True)
    whole, cut, written = measure([Subject.of(base), Subject.of(made / "r.yml"), Subject.of(made / "out")], quick).rows
    assert cut.parameters == written.parameters < 0.6 * whole.parameters and cut.layers == 6


@pytest.mark.slow
def test_a_sweep_measures_recipes_of_any_kind(
    made: Path, tiny: Callable[..., Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    from lmprune.sharing.results import Measured
    from lmprune.sweeping.folder import Sweep
    from lmprune.sweeping.run import SweepRun
    from lmprune.sweeping.settings import SweepSettings

    base, out = str(tiny("llama", tie_word_embeddings=True)), tmp_path / "run"
    asked: dict[str, Any] = {"fractions": "0.25", "tasks": "lmprune_demo", "limit": 4, "samples": 4, "device": "cpu"}
    settings = SweepSettings(recipes=str(made / "r.yml"), bench=False, criteria="deepest", **asked)
    run = SweepRun(base, out, settings, DEMO)
    prepared = run.prepare()
    assert [point.name for point in prepared.points] == ["baseline", "deepest-02", "r-02"]
    assert run.measure(prepared) == []
    again = SweepRun(base, out, SweepSettings(bench=False, criteria="deepest", **asked), DEMO)
    assert again.prepare() == prepared == Sweep.read(out) and again.left(prepared) == [], (
        "its recipe lies in the folder"
    )
    point = prepared.points[2]
    assert point.plan == open_cut(made / "r.yml").plan and "narrows the FFN to 96 neurons" in point.what
    code, _, err = invoke(capsys, monkeypatch, "report", out, "-o", tmp_path / "page.html")
    assert code == 0, err
    assert "narrows the FFN to 96 neurons" in (tmp_path / "page.html").read_text()
    from lmprune.reporting.collect import Collected

    found = Measured.of(Collected.read(out), point.plan, None, made="")
    assert found.point == point
    with pytest.raises(RecipeError, match="it is for another model"):
        SweepRun(str(tiny("qwen3")), tmp_path / "other", settings, DEMO)
    with pytest.raises(UsageError, match="which weights of few bits cannot"):
        few = SweepSettings(recipes=str(made / "r.yml"), quantization="int8", **asked)
        SweepRun(base, tmp_path / "few", few, DEMO)


def test_it_is_profiled_streamed_as_in_memory(made: Path) -> None:
    import numpy as np

    from lmprune.profiling.measuring import LiveModel, StreamedModel

    cut = open_cut(made / "r.yml")
    batches = [[np.arange(4, 16, dtype=np.int32), np.arange(20, 29, dtype=np.int32)]]
    kept = LiveModel(cut.load(), "last", print).measure(batches)
    streamed = StreamedModel(cut, "last", dtype="auto", device=torch.device("cpu"), at_once=2).measure(batches)
    for one, other in zip(kept, streamed):
        assert np.isfinite(one).all() and np.array_equal(one, other)


@pytest.mark.slow
def test_a_sweep_searches_for_its_budgets_once(tiny: Callable[..., Path], tmp_path: Path) -> None:
    from lmprune.sweeping.run import SweepRun
    from lmprune.sweeping.settings import SweepSettings

    asked: dict[str, Any] = {"fractions": "0.25", "tasks": "lmprune_demo", "limit": 2, "samples": 4, "device": "cpu"}
    settings = SweepSettings(params="0.8", bench=False, criteria="deepest", **asked)
    run = SweepRun(str(tiny("llama")), tmp_path / "run", settings, DEMO)
    prepared = run.prepare()
    (point,) = (point for point in prepared.points if point.criterion == "params")
    assert point.name == "params-80" and point.plan == open_cut(tmp_path / "run/recipes/params-80.yml").plan
    assert run.measure(prepared) == []
    before = (tmp_path / "run/recipes/params-80.yml").stat().st_mtime_ns
    assert SweepRun(str(tiny("llama")), tmp_path / "run", settings, DEMO).prepare() == prepared
    assert (tmp_path / "run/recipes/params-80.yml").stat().st_mtime_ns == before


@pytest.mark.parametrize("params", ["1.5", "0", "0.5,x"])
def test_shares_of_a_sweep_are_checked(params: str) -> None:
    from lmprune.sweeping.settings import SweepSettings

    with pytest.raises(UsageError, match=r"--params"):
        SweepSettings(params=params)


@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_narrower_stream_is_refitted_in_files_to_the_same_bits(
    tied: bool, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_files, "_LEAST", 1)
    monkeypatch.setattr(in_files, "_in_memory", lambda folder: False)
    made: list[Any] = []
    kept_in = StreamedModel.in_files

    def watched(self: StreamedModel, files: Any) -> Any:
        made.append(kept_in(self, files))
        return made[-1]

    monkeypatch.setattr(StreamedModel, "in_files", watched)
    base = tiny("llama", tie_word_embeddings=tied)
    write_recipe(base, Plan(LAYERS, (2, 5), (width(base, groups=None),)), tmp_path / "r.yml")
    settings = HealSettings(method="refit", fit_blocks=10, max_length=32, eval_blocks=4, device="cpu")
    solved = Kept.keep

    def killed(self: Kept, layer: int, *rest: Any) -> None:
        solved(self, layer, *rest)
        if layer == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Kept, "keep", killed)
    with pytest.raises(KeyboardInterrupt):
        heal(tmp_path / "r.yml", tmp_path / "streamed", replace(settings, stream=True), DEMO)
    monkeypatch.setattr(Kept, "keep", solved)

    def full(*args: Any) -> None:
        raise OutputError("no room")

    with monkeypatch.context() as disk:
        disk.setattr(in_files, "check_room", full)
        with pytest.raises(OutputError, match="no room"):
            heal(tmp_path / "r.yml", tmp_path / "streamed", replace(settings, stream=True), DEMO)
    assert list(tmp_path.glob(".streamed.healing/*-solved/layer-*.json")), "what was solved is kept"
    made.clear()
    for name, stream in (("streamed", True), ("whole", False)):
        heal(tmp_path / "r.yml", tmp_path / name, replace(settings, stream=stream), DEMO)
    assert len(made) == 2, "both models, and only where it was asked for"
    assert all(p.untyped_storage().filename is not None for model in made for p in model.parameters())
    streamed, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("streamed", "whole"))
    assert streamed.keys() == whole.keys()
    for name, tensor in streamed.items():
        assert torch.equal(tensor, whole[name]), name
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set(), "nothing is left"
