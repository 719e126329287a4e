"""Profiling a model folder: streamed, interrupted, shared between processes, and by the command line."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmprune.errors import DataError, ModelError, PlanError, UsageError
from lmprune.profiling import ProfileSettings, profile_model
from lmprune.profiling.distances import Profile
from lmprune.text.sources import DataSettings

LAYERS = 6
SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},
    "gpt2": {"n_embd": 32, "n_layer": LAYERS, "n_head": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "mamba": {"state_size": 8},
}
DEMO = DataSettings(data="demo")
FEW = ProfileSettings(samples=40, max_length=32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Bytes and a few merges."""
    from itertools import islice

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from lmprune.text.world import documents

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(islice(documents("profiling-tests"), 100), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Any:
    """``folder('llama')``: a random model in bfloat16 on disk."""
    import torch
    import transformers

    made: dict[str, Path] = {}

    def make(kind: str, **changes: Any) -> Path:
        key = f"{kind}{changes}"
        if key not in made:
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(kind, **(SIZES | KINDS.get(kind, {}) | changes))
            model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
            made[key] = tmp_path_factory.mktemp(kind)
            model.save_pretrained(made[key])
            tokenizer.save_pretrained(made[key])
        return made[key]

    return make


def lmprune(*arguments: object, cwd: Path, code: int | None = 0, launcher: tuple[str, ...] = ()) -> Any:
    start = launcher or (sys.executable,)
    done = subprocess.run(
        [*start, "-m", "lmprune", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert code is None or done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """``cli("profile", ...)`` runs the command line in this process, in an empty folder; gives ``out`` and ``err``."""

    def call(*arguments: object, code: int = 0, stdin: str = "") -> Any:
        from lmprune.cli import main

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["lmprune", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        assert left.value.code == code, printed
        return printed

    return call


# --- streaming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["last", "all"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_streaming_gives_the_same_bits(folder: Any, kind: str, token: Any) -> None:
    settings = ProfileSettings(samples=20, max_length=32, token=token, stream=False)
    kept = profile_model(str(folder(kind)), None, settings, DEMO, progress=False)
    streamed = profile_model(
        str(folder(kind)),
        None,
        ProfileSettings(samples=20, max_length=32, token=token, stream=True),
        DEMO,
        progress=False,
    )
    assert streamed.to_json() == kept.to_json()


def test_streaming_in_another_type_and_in_rounds(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmprune.profiling import run

    settings = {"samples": 150, "max_length": 32, "dtype": "float32", "batch_size": 8}
    kept = profile_model(str(folder("llama")), None, ProfileSettings(stream=False, **settings), DEMO, progress=False)
    monkeypatch.setattr(run, "batches_at_once", lambda *_: 3)
    streamed = profile_model(str(folder("llama")), None, ProfileSettings(stream=True, **settings), DEMO, progress=False)
    assert streamed.to_json() == kept.to_json() and kept.dtype == "float32"


def test_streaming_a_sharded_checkpoint(folder: Any, tmp_path: Path, tokenizer: Any) -> None:
    from lmprune.models.loading import load_model

    model = load_model(folder("llama"))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    parts = [
        profile_model(str(path), None, ProfileSettings(samples=20, max_length=32, stream=True), DEMO, progress=False)
        for path in (folder("llama"), tmp_path)
    ]
    assert (parts[0].distances == parts[1].distances).all()


def test_streaming_is_chosen_when_the_model_does_not_fit(
    folder: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lmprune")
    from lmprune.forward import machine as memory
    from lmprune.models import loading

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the whole model was loaded")

    monkeypatch.setattr(memory, "free_memory", lambda _: 10_000)
    monkeypatch.setattr(loading, "load_model", never)
    profile_model(str(folder("llama")), None, ProfileSettings(samples=8, max_length=32), DEMO, progress=False)
    assert "reading one layer at a time (--stream)" in caplog.text


def test_samples_fit_the_window_under_any_name(folder: Any) -> None:
    """GPT-2 calls it n_positions."""
    settings = ProfileSettings(samples=2, max_length=2048)
    measured = profile_model(str(folder("gpt2")), None, settings, DataSettings(data="demo", pack=True), progress=False)
    assert measured.tokens == 2 * SIZES["max_position_embeddings"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("times, said", [(2, r"layer 0 2 times and not once: .* Use --layers"), (0, "layer 3 never")])
def test_a_decoder_that_does_not_run_each_layer_once_is_refused(
    folder: Any, monkeypatch: pytest.MonkeyPatch, stream: bool, times: int, said: str
) -> None:
    """States would be missing, or not be the inputs of the next layers, and nobody would see it."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaModel

    def forward(self: Any, input_ids: Any, attention_mask: Any = None, use_cache: bool = False) -> None:
        hidden = self.embed_tokens(input_ids)
        rotary = self.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
        for place, layer in enumerate(self.layers):
            for _ in range(times or place != 3):
                hidden = layer(hidden, position_embeddings=rotary)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    with pytest.raises(ModelError, match=said):
        profile_model(str(folder("llama")), None, ProfileSettings(stream=stream, samples=8), DEMO, progress=False)


def test_tensors_that_do_not_fit_are_named(folder: Any, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder("llama"), tmp_path / "m")
    weights = tmp_path / "m/model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.2.mlp.up_proj.weight"
    for problem, changed in (("missing", {}), ("mismatched", {name: tensors[name][:-1].clone()})):
        save_file({key: value for key, value in tensors.items() if key != name} | changed, weights, {"format": "pt"})
        with pytest.raises(ModelError, match=f"does not fit its config: {problem} tensor '{name}'"):
            settings = ProfileSettings(stream=True, samples=8)
            profile_model(str(tmp_path / "m"), None, settings, DEMO, progress=False)


# --- cuts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("token", ["last", "all"])
def test_a_recipe_is_profiled_as_the_checkpoint_it_makes(folder: Any, tmp_path: Path, stream: bool, token: Any) -> None:
    from lmprune.choosing import write_recipe
    from lmprune.cuts.plan import Plan
    from lmprune.writing.pruning import prune

    recipe = tmp_path / "recipe.yml"
    write_recipe(str(folder("qwen3")), Plan(LAYERS, (1, 4)), recipe)
    prune(recipe, tmp_path / "pruned")
    settings = ProfileSettings(samples=20, max_length=32, token=token, stream=stream)
    cut, written = (
        profile_model(str(path), None, settings, DEMO, progress=False) for path in (recipe, tmp_path / "pruned")
    )
    assert cut.layers == LAYERS - 2 and cut.fingerprint != written.fingerprint
    for name in ("distances", "low", "high", "block_influence", "relative_magnitude", "norms"):
        assert np.array_equal(getattr(cut, name), getattr(written, name)), name
    assert cut.data_hash == written.data_hash and cut.tokens == written.tokens


def test_a_pruned_demo_model_is_profiled_on_its_own_text(tmp_path: Path, cli: Any) -> None:
    """Without the network: a cut of the demo model inherits the demo world."""
    cli("recipe", "demo", "-o", "recipe.yml", "--layers", "3-4")
    cli("prune", "recipe.yml", "pruned")
    for model in ("recipe.yml", "pruned"):
        cli("profile", model, "-o", "p.json", "--samples", 8, "--max-length", 16)
        measured = Profile.read(tmp_path / "p.json")
        assert measured.source.startswith("demo") and measured.layers == 10


# --- going on -----------------------------------------------------------------------------------------------------


def run_of(seed: int) -> tuple[Any, ...]:
    """Options of a run that takes a while."""
    return ("--data", "demo", "--samples", 400, "--max-length", 48, "--batch-size", 4, "--seed", seed)


def started(tmp_path: Path, *arguments: object, size: int = 20_000) -> subprocess.Popen[bytes]:
    """``lmprune profile`` in a process of its own, stopped once it has noted so many bytes in its journal."""
    partial = tmp_path / "p.json.partial"
    before = head_of(partial)
    command = [sys.executable, "-m", "lmprune", "profile", *map(str, arguments), "-o", "p.json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if head_of(partial) != before and partial.stat().st_size > size:
            process.send_signal(signal.SIGSTOP)
            break
        time.sleep(0.02)
    return process


def head_of(journal: Path) -> str:
    """The line that says whose journal it is."""
    return journal.read_text().partition("\n")[0] if journal.exists() else ""


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_two_killed_runs_and_a_third_never_mix(folder: Any, tmp_path: Path) -> None:
    """On one output: another command is refused while the first runs, starts anew after its end, and so does a third.

    What is measured last equals a run that nobody disturbed.
    """
    model = folder("qwen3", num_hidden_layers=24)
    first = started(tmp_path, model, *run_of(1))
    refused = lmprune("profile", model, *run_of(2), "-o", "p.json", cwd=tmp_path, code=1)
    assert "another run is writing p.json.partial" in refused.stderr and refused.stderr.count("\n") == 1
    kill(first)
    kill(started(tmp_path, model, *run_of(2)))
    done = lmprune("profile", model, *run_of(1), "-o", "p.json", cwd=tmp_path)
    assert "was left by another command: starting anew" in done.stderr
    lmprune("profile", model, *run_of(1), "-o", "q.json", cwd=tmp_path)
    assert (tmp_path / "p.json").read_bytes() == (tmp_path / "q.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.json", "q.json"]


@pytest.mark.parametrize("broken", ["samples", "values"])
def test_a_record_of_another_batch_is_not_taken(folder: Any, tmp_path: Path, broken: str) -> None:
    """Records are checked on reading: of a batch of other samples or another size, and all after it, none counts."""
    output, partial = tmp_path / "p.json", tmp_path / "p.json.partial"
    expected = profile_model(str(folder("llama")), None, FEW, DEMO, progress=False)
    stop_after(3, folder, output)
    lines = partial.read_text().splitlines()
    records = [json.loads(line) for line in lines[1:]]
    assert [record["key"] for record in records] == [0, 1]
    records[0]["value"][broken] = records[1]["value"][broken] if broken == "samples" else "nothing"
    partial.write_text("\n".join([lines[0], *map(json.dumps, records)]) + "\n")
    again = profile_model(str(folder("llama")), output, FEW, DEMO, progress=False)
    assert again.to_json() == expected.to_json()


def stop_after(calls: int, folder: Any, output: Path) -> None:
    """Profile, interrupted in that many calls of the model."""
    from lmprune.profiling.measuring import LiveModel

    honest, made = LiveModel.measure, []

    def impatient(self: LiveModel, batches: Any) -> Any:
        made.append(1)
        if len(made) == calls:
            raise KeyboardInterrupt
        return honest(self, batches)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LiveModel, "measure", impatient)
        profile_model(str(folder("llama")), output, FEW, DEMO, progress=False)


@pytest.mark.slow
def test_killed_and_gone_on_equals_uninterrupted(folder: Any, tmp_path: Path) -> None:
    """kill -9 in the middle; the same command ends with the same file as a run that nobody disturbed."""
    common = (folder("qwen3", num_hidden_layers=24), *run_of(0))
    partial = tmp_path / "p.json.partial"
    kill(started(tmp_path, *common))
    assert partial.exists() and not (tmp_path / "p.json").exists()
    done = lmprune("profile", *common, "-o", "p.json", cwd=tmp_path)
    assert "going on from" in done.stderr and not partial.exists()
    lmprune("profile", *common, "-o", "q.json", cwd=tmp_path)
    assert (tmp_path / "p.json").read_bytes() == (tmp_path / "q.json").read_bytes()


def test_an_interrupted_run_says_how_to_go_on(folder: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lmprune")
    whole = profile_model(str(folder("llama")), None, FEW, DEMO, progress=False)
    output = tmp_path / "p.json"
    stop_after(3, folder, output)
    assert "interrupted after 16 of 40 samples: the same command goes on" in caplog.text
    profile_model(str(folder("llama")), output, FEW, DEMO, progress=False)
    assert Profile.read(output).to_json() == whole.to_json()


def test_another_command_starts_anew(folder: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lmprune")
    (tmp_path / "p.json.partial").write_text('{"another": "run"}\n')
    profile_model(str(folder("llama")), tmp_path / "p.json", FEW, DEMO, progress=False)
    assert "was left by another command: starting anew" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


def test_a_profile_is_used_again_only_if_it_is_the_same(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmprune.profiling.measuring import LiveModel

    output = tmp_path / "p.json"
    first = profile_model(str(folder("llama")), output, FEW, DEMO, progress=False)
    runs: list[int] = []
    honest = LiveModel.measure
    monkeypatch.setattr(LiveModel, "measure", lambda self, batches: runs.append(1) or honest(self, batches))
    again = profile_model(str(folder("llama")), output, FEW, DEMO, reuse=True, progress=False)
    assert not runs and again.to_json() == first.to_json()
    for changed in ({"seed": 1}, {"samples": 41}, {"token": "all"}, {"dtype": "float32"}, {"until": 0.9}):
        runs.clear()
        settings = ProfileSettings(**({"samples": 40, "max_length": 32} | changed))
        profile_model(str(folder("llama")), output, settings, DEMO, reuse=True, progress=False)
        assert runs, changed


# --- processes and the command line -------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_equal_one(folder: Any, tmp_path: Path) -> None:
    common = ("profile", folder("qwen3"), "--data", "demo", "--samples", 60, "--max-length", 32)
    lmprune(*common, "-o", "one.json", cwd=tmp_path)
    launch = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")
    done = lmprune(*common, "-o", "two.json", cwd=tmp_path, launcher=launch)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert done.stdout.count("two.json") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "two.json"]


def test_the_command_prints_its_result(folder: Any, tmp_path: Path, cli: Any) -> None:
    """With text from stdin, packed; the last line is the path, and the picture can be drawn from it."""
    text = "\n\n".join(f"paragraph {i} about layers" for i in range(60))
    options = ("--data", "-", "--pack", "--max-length", 16, "--token", "all")
    printed = cli("profile", folder("llama"), "-o", "p.json", *options, stdin=text)
    lines = printed.out.splitlines()
    assert lines[-1] == "p.json" and "6 layers" in lines[0] and "of stdin" in lines[0]
    assert any(line.startswith("best block of  1: layers ") for line in lines)
    assert "fewer than the 1000 that were asked for" in printed.err
    made = Profile.read(tmp_path / "p.json")
    assert made.source == "stdin" and made.settings["pack"] is True and made.fingerprint
    assert cli("plot", "p.json", "-o", "map.svg", "--drop", 2).out == "map.svg\n"
    assert (tmp_path / "map.svg").read_text().lstrip().startswith("<?xml")


def test_json_is_all_that_is_printed(folder: Any, cli: Any) -> None:
    options = ("--data", "demo", "--samples", 20, "--max-length", 16)
    result = json.loads(cli("profile", folder("llama"), "-o", "p.json", *options, "--json").out)
    assert result["out"] == "p.json" and result["samples"] == 20
    assert result["rows"][0]["n"] == 1 and result["rows"][0]["share"] is None, "of 20 samples nothing is certain"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["demo", "gpt2", "qwen3"])
def test_every_way_by_the_command_line(folder: Any, tmp_path: Path, cli: Any, kind: str) -> None:
    """Both token modes, streamed and not, until it is certain, the picture and the recipe."""
    model = "demo" if kind == "demo" else folder(kind)
    common = ("--data", "demo", "--samples", 96, "--max-length", 24)
    for token in ("last", "all"):
        for way in ("--stream", "--no-stream"):
            cli("profile", model, "-o", f"{token}{way}.json", "--token", token, way, *common)
        first, second = (Profile.read(tmp_path / f"{token}{way}.json") for way in ("--stream", "--no-stream"))
        assert first.to_json() == second.to_json() and first.token == token and first.samples == 96
    cli("profile", model, "-o", "until.json", "--until", 0.8, "--drop", 2, *common)
    assert Profile.read(tmp_path / "until.json").samples in (64, 80, 96)
    assert cli("plot", "all--stream.json", "-o", "map.png").out == "map.png\n"
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    printed = json.loads(cli("recipe", "last--stream.json", "-o", "recipe.yml", "--drop", 2, "--json").out)
    start = Profile.read(tmp_path / "last--stream.json").best_block(2)
    assert printed["dropped"] == [start, start + 1] and (tmp_path / "recipe.yml").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--device", "abacus"), 2, "--device 'abacus' is no device"),
        (("--drop", "6", "--until", "0.9"), 2, "this model has 6 layers"),
        (("--data", "nosuch.txt"), 1, "no file 'nosuch.txt'"),
        (("--data", "demo", "--chat-template"), 1, "no chat template"),
        (("--token", "first"), 2, "first"),
    ],
)
def test_mistakes_take_one_line(
    folder: Any, tmp_path: Path, cli: Any, arguments: tuple[str, ...], code: int, message: str
) -> None:
    printed = cli("profile", folder("llama"), "-o", "p.json", *arguments, code=code)
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert list(tmp_path.iterdir()) == []


def test_mistakes_before_any_forward_pass(folder: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model at"):
        profile_model("nosuch", None, FEW, DEMO)
    with pytest.raises(UsageError, match="torch sees no CUDA device") if not _cuda() else pytest.raises(PlanError):
        profile_model(str(folder("llama")), None, ProfileSettings(device="cuda", drop=99), DEMO)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="holds no text"):
        profile_model(str(folder("llama")), None, FEW, DataSettings(data=str(tmp_path / "empty.txt")))


def _cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_weights(folder: Any, quantization: Any) -> None:
    path = str(folder("llama", hidden_size=64, intermediate_size=128))
    exact = profile_model(path, None, FEW, DEMO, progress=False)
    coarse = profile_model(
        path, None, ProfileSettings(samples=40, max_length=32, quantization=quantization), DEMO, progress=False
    )
    assert coarse.dtype == quantization and np.abs(coarse.distances - exact.distances).max() < 0.05


def test_device_map(folder: Any) -> None:
    exact, spread = (
        profile_model(str(folder("llama")), None, replace(FEW, dtype="float32", device_map=place), DEMO, progress=False)
        for place in (None, "auto")
    )
    assert np.abs(spread.distances - exact.distances).max() < 1e-6
