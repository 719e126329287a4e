"""`lmprune heal` as a user runs it: every method, every switch, on one process and on two."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe
from lmprune.healing.methods import METHODS as TABLE
from lmprune.healing.methods import Training

SHORT = {
    "method": "lora",
    "steps": 4,
    "batch_size": 4,
    "max-length": 32,
    "eval-blocks": 4,
    "eval-every": 2,
    "rank": 4,
    "lr": 1e-3,
    "warmup": 1,
}
TRAINS = tuple(name for name, way in TABLE.items() if issubclass(way, Training))
METHODS = (*TRAINS, *(f"{trains}+distill" for trains in TRAINS))


@pytest.fixture
def recipe(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """``recipe('llama')``: a recipe that drops layers 3 and 4, of twelve for the demo model and else of eight."""

    def make(kind: str) -> Path:
        name, layers, dtype = ("demo", 12, None) if kind == "demo" else (str(tiny(kind)), 8, "bfloat16")
        path = tmp_path / f"{kind}.yml"
        path.write_text(Recipe(name, tuple(Plan(layers, (3, 4)).slices()), layers=layers, dtype=dtype).to_yaml())
        return path

    return make


def _arguments(recipe: Path, out: Path, *more: str, **given: Any) -> list[str]:
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in (SHORT | given).items()
        if name != "rank" or str(given.get("method", "lora")).startswith(("lora", "qlora", "distill"))
    ]
    return ["heal", str(recipe), str(out), "--data=demo", *options, *more]


def _heal(recipe: Path, out: Path, *more: str, **given: Any) -> dict[str, Any]:
    """What the command printed as JSON."""
    from lmprune.cli.app import app

    done = CliRunner().invoke(app, _arguments(recipe, out, "--json", *more, **given), catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _history(out: Path) -> list[float]:
    """Held-out losses over the run."""
    return [loss for _, loss in json.loads((out / "lmprune.json").read_text())["healing"]["held_out"]]


def _lower(done: dict[str, Any]) -> bool:
    """Whether the held-out loss fell; all that was measured on blocks says how sure it is."""
    losses = done["losses"]
    assert all(one["error"] > 0 for one in losses.values())
    return bool(losses["healed"]["value"] < losses["pruned"]["value"])


KINDS = ("demo", "gpt2", "qwen3")
ON_MODELS = [
    pytest.param(method, kind, marks=[] if kind == KINDS[number % 3] else pytest.mark.slow)
    for number, method in enumerate(METHODS)
    for kind in KINDS
]
"""Every method on one of the models, in turns, by default; on the others in the slow run."""


@pytest.mark.parametrize(("method", "kind"), ON_MODELS)
def test_every_method(recipe: Callable[..., Path], tmp_path: Path, kind: str, method: str) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    done = _heal(recipe(kind), out, method=method, steps=6, lr=2e-3)
    assert done["method"] == method
    if kind == "demo" or "distill" not in method:  # a random teacher knows nothing about text
        assert _lower(done)
    layers = 10 if kind == "demo" else 6
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == layers
    assert (
        json.loads((out / "lmprune.json").read_text())["healing"]["losses"]["healed"]
        == done["losses"]["healed"]["value"]
    )


@pytest.mark.slow
def test_accumulation_and_recomputing_change_nothing_but_memory(recipe: Callable[..., Path], tmp_path: Path) -> None:
    path, losses = recipe("llama"), []
    for name, more in {"whole": [], "parts": ["--micro-batch-size=1"], "again": ["--gradient-checkpointing"]}.items():
        _heal(path, tmp_path / name, "--dtype=float32", *more)
        losses.append(_history(tmp_path / name))
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0] == pytest.approx(losses[2], abs=1e-4)


def test_eight_bits_train_and_merge(recipe: Callable[..., Path], tmp_path: Path) -> None:
    done = _heal(recipe("llama"), tmp_path / "out", method="qlora", quantization="int8")
    assert _lower(done) and done["merged_distance"] < 3e-2


def test_patience_stops_a_run_that_gets_no_better(recipe: Callable[..., Path], tmp_path: Path) -> None:
    done = _heal(recipe("llama"), tmp_path / "out", steps=20, lr=1e-12, patience=2)
    assert done["steps"] < 20


def test_loggers_of_trainer(recipe: Callable[..., Path], tmp_path: Path) -> None:
    _heal(recipe("llama"), tmp_path / "out", report_to="tensorboard")
    assert list((tmp_path / "out" / "runs").rglob("events.out.*"))


@pytest.mark.parametrize("name", ["wand", "comet_ml"])
def test_a_logger_that_is_not_there_is_said_first(recipe: Callable[..., Path], tmp_path: Path, name: str) -> None:
    from lmprune.cli.app import app
    from lmprune.errors import UsageError

    with pytest.raises(UsageError, match=f"--report-to {name}: "):
        arguments = _arguments(recipe("llama"), tmp_path / "out", report_to=name)
        CliRunner().invoke(app, arguments, catch_exceptions=False, standalone_mode=False)
    assert not list(tmp_path.glob("*out*"))


# --- text that the unpruned model wrote -----------------------------------------------------------------------------


def test_self_data_is_the_models_own_and_kept(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMPRUNE_CACHE", str(tmp_path / "cache"))
    path = recipe("demo")
    first = _heal(path, tmp_path / "one", "--self-data", max_length=64)
    (file,) = (tmp_path / "cache" / "self-data").glob("*.jsonl")
    made = file.stat().st_mtime_ns, file.read_text()
    assert _lower(first)
    text = made[1].splitlines()
    assert text and all(len(json.loads(line)["text"]) > 20 for line in text)
    _heal(path, tmp_path / "two", "--self-data", max_length=64)
    assert (file.stat().st_mtime_ns, file.read_text()) == made
    healing = json.loads((tmp_path / "one" / "lmprune.json").read_text())["healing"]
    assert healing["data"]["self_data"] is True


def _writer(recipe: Path, **given: Any) -> Any:
    from lmprune.healing.self_data import Writer
    from lmprune.models.loading import load_tokenizer
    from lmprune.text.blocks import read_held_out
    from lmprune.text.sources import DataSettings

    base = Path(Recipe.read(recipe).model)
    data = given.pop("data", DataSettings(data="demo"))
    held_out = read_held_out(DataSettings(data="demo"), load_tokenizer(base), blocks=4, length=64, default="demo")
    values = {"blocks": 120, "length": 64, "seed": 0, "default": "demo", "device": "cpu", "dtype": "float32"}
    return Writer(base, data, held_out, **values | given)


def test_interrupted_writing_goes_on_to_the_same_text(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmprune.healing.self_data import Writer

    path, texts, bare = recipe("llama"), [], Writer._answers

    def with_line_ends(self: Any, *args: Any) -> Any:
        yield from (f"{document}\u2028\u0085" for document in bare(self, *args))  # to Python; to a model they are text

    monkeypatch.setattr(Writer, "_answers", with_line_ends)
    for name in ("whole", "broken"):
        monkeypatch.setenv("LMPRUNE_CACHE", str(tmp_path / name))
        writer = _writer(path)
        if name == "broken":
            real, calls = type(writer)._answers, []

            def stop(self: Any, *args: Any, real: Any = real, calls: list[int] = calls) -> Any:
                calls.append(1)
                for count, document in enumerate(real(self, *args)):
                    if len(calls) == 2 and count == 5:
                        raise KeyboardInterrupt
                    yield document

            with monkeypatch.context() as patch:
                patch.setattr(type(writer), "_answers", stop)
                with pytest.raises(KeyboardInterrupt):
                    writer.write()
            assert list((tmp_path / name / "self-data").glob("*.half"))
        texts.append(Path(writer.write().data).read_text())
    assert texts[0] == texts[1] and texts[0].count("\n") > 32


def test_conversations_are_answered_by_the_model(
    recipe: Callable[..., Path], tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmprune.models import loading
    from lmprune.text.sources import DataSettings

    monkeypatch.setenv("LMPRUNE_CACHE", str(tmp_path / "cache"))
    real = loading.load_tokenizer

    def with_template(folder: Path, **kwargs: Any) -> Any:
        tokenizer = real(folder, **kwargs)
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )
        return tokenizer

    monkeypatch.setattr("lmprune.healing.self_data.load_tokenizer", with_template)
    talks = [
        [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": "never this"}] for i in range(64)
    ]
    file = tmp_path / "talks.jsonl"
    file.write_text("".join(json.dumps({"text": talk}) + "\n" for talk in talks))
    data = _writer(recipe("llama"), data=DataSettings(data=str(file), chat_template=True), blocks=8).write()
    assert data.chat_template and data.data is not None
    written = [json.loads(line)["text"] for line in Path(data.data).read_text().splitlines()]
    assert all([m["role"] for m in talk] == ["user", "assistant"] for talk in written)
    assert len({talk[1]["content"] for talk in written}) > 1 and "never this" not in Path(data.data).read_text()


# --- weights spread over processes ----------------------------------------------------------------------------------


def _launch(recipe: Path, out: Path, *more: str, processes: int = 2, **given: Any) -> subprocess.Popen[str]:
    script = [str(Path(__file__).with_name("fsdp_on_cpu.py"))] if processes > 1 else ["-m", "lmprune"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), *script, *_arguments(recipe, out, *more, **given)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, more",
    [("lora", ()), ("qlora", ()), ("full", ()), ("last-layers", ()), ("lora", ("--dtype=bfloat16",))],
)
def test_spread_weights_lose_what_whole_ones_lose(
    recipe: Callable[..., Path], tmp_path: Path, method: str, more: tuple[str, ...]
) -> None:
    path, losses = recipe("llama"), []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        run = _launch(
            path, out, *(more or ("--dtype=float32",)), processes=processes, method=method, micro_batch_size=1
        )
        stdout, stderr = run.communicate()
        assert run.returncode == 0, stderr[-3000:]
        assert stdout.count(str(out)) == 1  # one process speaks
        losses.append(_history(out))
    assert losses[0] == pytest.approx(losses[1], abs=2e-2 if more else 1e-4)
    if method != "qlora" and not more:  # 4 bits and bfloat16 are coarser than what four steps change
        assert losses[0][-1] < losses[0][0]


@pytest.mark.slow
def test_a_killed_run_with_spread_weights_goes_on(recipe: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path, given = recipe("llama"), {"steps": 40, "eval_every": 10}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert _launch(path, whole, **given).wait() == 0
    run = _launch(path, killed, **given)
    assert run.stderr is not None
    for line in run.stderr:
        if re.match(r"step 30/", line):
            run.send_signal(signal.SIGKILL)
            break
    subprocess.run(["pkill", "-9", "-f", str(killed)], check=False)
    run.wait()
    assert not killed.exists()
    again = _launch(path, killed, **given)
    _, stderr = again.communicate()
    assert again.returncode == 0 and "going on after step" in stderr, stderr[-3000:]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (killed, whole))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize("method, version, said", [("lora", "1", "--fsdp_version 2"), ("distill", "2", "--use_fsdp")])
def test_what_fsdp_cannot_do_is_refused(
    recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    version: str,
    said: str,
) -> None:
    from lmprune.cli.app import app
    from lmprune.errors import UsageError

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(UsageError, match=said):
        arguments = _arguments(recipe("llama"), tmp_path / "out", method=method)
        CliRunner().invoke(app, arguments, catch_exceptions=False, standalone_mode=False)
