"""Fixtures shared by all tests: tiny random models on disk, and running commands as a user would."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import LONGEST, Commands

os.environ["HF_HUB_OFFLINE"] = "1"
# The models are tiny: a second thread gains nothing, and waits for ever on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

BIN = Path(sys.executable).parent
VOCABULARY = 320
_known_modules = 0


def pytest_runtest_call() -> None:
    """Set aside what imports have made: healing looks through all objects again and again, and these stay anyway."""
    global _known_modules
    if len(sys.modules) > 1.1 * _known_modules:
        gc.collect()
        gc.freeze()
        _known_modules = len(sys.modules)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level tokenizer of 320 tokens, trained on a few documents of the demo world."""
    from itertools import islice

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from lmprune.text import world

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(islice(world.documents("tests"), 300), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|pad|>", model_max_length=512
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[..., Path]:
    """``tiny('llama')``: the folder of a random 8-layer model with a tokenizer, the same for the same arguments."""
    import torch
    import transformers

    made: dict[str, Path] = {}

    def make(kind: str, **config: Any) -> Path:
        key = f"{kind}-{sorted(config.items())}"
        if key not in made:
            values: dict[str, Any] = {
                "vocab_size": VOCABULARY,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 8,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                "bos_token_id": 0,
                "eos_token_id": 0,
                "pad_token_id": 1,
                # large enough that every layer matters to the logits
                "initializer_range": 0.2,
            } | config
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **values))
            folder = tmp_path_factory.mktemp(kind)
            model.to(torch.bfloat16).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models are slower on several threads, and sums depend on how many there are."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    """What runs commands."""
    made = Commands()
    yield made
    made.close()


@pytest.fixture
def run(tmp_path: Path, commands: Commands) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run('lmprune', 'prune', ...)`` runs an installed command in an empty folder, offline.

    Imports are skipped where nothing depends on them; ``fresh=True`` runs the very file that is installed.
    """

    def call(command: str, *arguments: object, code: int | None = 0, fresh: bool = False, **environment: str) -> Any:
        words = [*map(str, arguments)]
        if command == "lmprune" and not fresh and not environment and hasattr(os, "fork"):
            done = commands(words, tmp_path)
        else:
            done = subprocess.run(
                [str(BIN / command), *words],
                cwd=tmp_path,
                env=os.environ | environment,
                capture_output=True,
                text=True,
                timeout=LONGEST,
            )
        if code is not None:
            assert done.returncode == code, f"{command} {words}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done

    return call


@pytest.fixture(scope="session")
def sweep_folder(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep of a random model: two criteria, two sizes, a few documents."""
    from lmprune.sweeping.run import SweepRun
    from lmprune.sweeping.settings import SweepSettings
    from lmprune.text.sources import DataSettings

    out = tmp_path_factory.mktemp("sweep") / "run"
    settings = SweepSettings(
        fractions="0.25,0.5",
        tasks="lmprune_demo,lmprune_demo_normalised_loss",
        limit=4,
        samples=8,
        device="cpu",
        seed=7,
    )
    run = SweepRun(str(tiny("qwen3")), out, settings, DataSettings(data="demo"))
    prepared = run.prepare()
    assert run.measure(prepared) == []
    run.bench(prepared)
    return out


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``package(group, name, source)`` installs a package of one file that offers itself, or ``what`` is in it."""

    def install(group: str, name: str, source: str, what: str = "") -> None:
        (tmp_path / f"outside_{name}.py").write_text(source)
        info = tmp_path / f"outside_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: outside-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = outside_{name}{what and f':{what}'}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")

    return install
