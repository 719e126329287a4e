"""Whatever a file holds, whoever reads it says one line, soon, and in little memory."""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import shutil
import signal
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from mutating import as_json, mutated

from lmprune.choosing import write_recipe
from lmprune.cuts.lineage import Lineage
from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe
from lmprune.errors import LmpruneError
from lmprune.forward.journal import Journal
from lmprune.models.checkpoint import INDEX, read_header
from lmprune.models.cut import open_cut
from lmprune.profiling.distances import Profile
from lmprune.reporting.collect import Collected
from lmprune.sharing.card import Card
from lmprune.sharing.subjects import look
from lmprune.sharing.telling import strip
from lmprune.text.sources import DataSettings, read_documents
from lmprune.text.tokens import tokenize

SECONDS = 5.0
"""Of processor time for one file."""
MEMORY = 1 << 30
"""Bytes that reading one file may add."""
TALK = [{"role": "user", "content": "two and two"}, {"role": "assistant", "content": "four"}]


@dataclass(frozen=True)
class Reader:
    """A file in a folder, how its text is taken apart for changing, and who reads it."""

    file: str
    read: Callable[[Path], Any]
    load: Callable[[str], Any] | None = json.loads
    dump: Callable[[Any], str] = as_json
    seed: str = "model"


# --- who reads ------------------------------------------------------------------------------------------------------


def _model(folder: Path) -> None:
    cut = open_cut(folder)
    _ = cut.layers, cut.window, cut.default_data, cut.checkpoint, cut.origin
    cut.load()


def _config(folder: Path) -> None:
    cut = open_cut(folder)
    write_recipe(cut, Plan(cut.layers, (1,)), folder / "r.yml")
    open_cut(folder / "r.yml").load()


def _tokens(folder: Path) -> None:
    tokenize(DataSettings(data=str(folder / "a.txt")), open_cut(folder).tokenizer(), samples=2, max_length=9, seed=0)


def _talks(folder: Path) -> None:
    data = DataSettings(data=str(folder / "talks.jsonl"), chat_template=True)
    tokenize(data, open_cut(folder).tokenizer(), samples=2, max_length=99, seed=0)


def _adapter(folder: Path) -> None:
    from lmprune.models.adapters import attach_adapter
    from lmprune.models.loading import load_model

    attach_adapter(load_model(folder), str(folder / "adapter"), folder)


def _report(folder: Path) -> None:
    from lmprune.reporting import page, pictures

    run = Collected.read(folder).alike()
    page._values(run)
    pictures.speed(run), pictures.quality(run)


def _profile(folder: Path) -> None:
    found = Profile.read(folder / "profile.json")
    found.certainty(1), found.best_block(1), found.interval(0, 1)


def _header(folder: Path) -> None:
    read_header(folder / "model.safetensors")
    cut = open_cut(folder)
    _ = cut.checkpoint.fingerprint
    cut.load()


def _shown(name: Path) -> None:
    subject = look(str(name))
    Card("ada/x", subject).text(), json.dumps(subject.to_data())
    if subject.plan is not None:
        strip(subject.plan)


def _rows(folder: Path) -> list[Any]:
    return list(read_documents(DataSettings(data=str(folder / "talks.jsonl")), seed=0))


def _packed(folder: Path) -> list[Any]:
    return list(read_documents(DataSettings(data=str(folder / "b.txt.gz")), seed=0))


READERS = {
    "recipe": Reader("r.yml", lambda folder: Recipe.read(folder / "r.yml"), yaml.safe_load, yaml.safe_dump),
    "shown recipe": Reader("r.yml", lambda folder: _shown(folder / "r.yml"), yaml.safe_load, yaml.safe_dump),
    "shown history": Reader("lmprune.json", _shown),
    "config": Reader("config.json", _config),
    "generation config": Reader("generation_config.json", _model),
    "lineage": Reader("lmprune.json", _model),
    "history": Reader("lmprune.json", lambda folder: Lineage.read(folder)),
    "index": Reader(INDEX, _model, seed="shards"),
    "header": Reader("model.safetensors", _header, None),
    "tokenizer": Reader("tokenizer.json", _tokens),
    "tokenizer config": Reader("tokenizer_config.json", _tokens),
    "template": Reader("chat_template.jinja", _talks, None),
    "adapter config": Reader("adapter/adapter_config.json", _adapter),
    "adapter header": Reader("adapter/adapter_model.safetensors", _adapter, None),
    "rows": Reader("talks.jsonl", _rows, None),
    "text": Reader("a.txt", _tokens, None),
    "packed text": Reader("b.txt.gz", _packed, None),
    "profile": Reader("profile.json", _profile, seed="sweep"),
    "sweep": Reader("sweep.json", _report, seed="sweep"),
    "results": Reader("results/baseline/results_0.json", _report, seed="sweep"),
    "samples": Reader("results/baseline/samples_0.jsonl", _report, None, seed="sweep"),
    "speed": Reader("bench.json", _report, seed="sweep"),
    "journal": Reader("journal", lambda folder: Journal(folder / "journal", {"a": 1}).close(), None),
}  # fmt: skip


# --- the seeds ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeds(tiny: Callable[..., Path], sweep_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small folders that hold every kind of file."""
    import numpy as np

    from lmprune.models.adapters import add_lora, save_adapter
    from lmprune.models.loading import load_model

    root = tmp_path_factory.mktemp("seeds")
    base, folder = tiny("llama", num_hidden_layers=3, hidden_size=16, intermediate_size=16), root / "model"
    shutil.copytree(base, folder)
    live = load_model(base)
    live.save_pretrained(root / "shards", max_shard_size="8KB")
    save_adapter(add_lora(live, rank=2, alpha=4, dropout=0.0, modules=["up_proj"], seed=0), folder / "adapter")
    write_recipe(base, Plan(3, (1,)), folder / "r.yml")
    Lineage(stage="prune", plan=Plan(4, (2,)), versions={"lmprune": "0"}).write(folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "do_sample": False, "eos_token_id": 0})
    )
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m['content'] | trim }}\n{% endfor %}"
    )
    (folder / "talks.jsonl").write_text("".join(json.dumps({"text": TALK}) + "\n" for _ in range(4)))
    (folder / "a.txt").write_text("many things\n\nof é few\n\nwords")
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"many things\n\nof few\n\nwords" * 9))
    with Journal(folder / "journal", {"a": 1}) as journal:
        journal.put(0, {"samples": [0, 1], "values": np.zeros((2, 3))})
    shutil.copytree(sweep_folder, root / "sweep", ignore=shutil.ignore_patterns("*.npz"))
    for old, new in (("results_*.json", "results_0.json"), ("samples_*.jsonl", "samples_0.jsonl")):
        for file in (root / "sweep" / "results").glob(f"*/{old}"):
            file.rename(file.with_name(new if old.startswith("results") else file.name))
    (found,) = (root / "sweep" / "results" / "baseline").glob("samples_*.jsonl")
    found.with_name("samples_0.jsonl").symlink_to(found.name)
    return {path.name: path for path in root.iterdir()}


# --- the trial ------------------------------------------------------------------------------------------------------


class TooSlow(BaseException):
    """A reader took longer than `SECONDS`."""


@contextmanager
def limited() -> Iterator[None]:
    """By this process's own time, since others may have the machine; and by the clock, so that all ends."""

    def stop(*_: Any) -> None:
        raise TooSlow

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, 20 * SECONDS)}
    before = {name: signal.signal(name, stop) for name in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, _ in timers.values():
            signal.setitimer(timer, 0)
        for name, handler in before.items():
            signal.signal(name, handler)


def fault(reader: Reader, folder: Path) -> str | None:
    """What is wrong with how a folder is read, in short; None where it is read, or refused as it should be."""
    began, used = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with limited():
            reader.read(folder)
    except LmpruneError as exc:
        said = str(exc)
        if "\n" in said or len(said) > 1500 or "\x1b" in said or any("\ud800" <= letter <= "\udfff" for letter in said):
            return f"a message that is no line: {said[:200]!r} of {len(said)}"
    except TooSlow:
        return "too slow"
    except Exception as exc:
        where = traceback.extract_tb(exc.__traceback__)
        ours = next((f"{Path(f.filename).name}:{f.lineno}" for f in reversed(where) if "lmprune" in f.filename), "")
        return f"{type(exc).__name__} at {ours}: {str(exc)[:100]!r}"
    if time.process_time() - began > SECONDS:
        return "too slow"
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used
    return f"{more >> 10} MiB more" if more << 10 > MEMORY else None


def tried(name: str, seeds: dict[str, Path], folder: Path, numbers: range) -> dict[str, list[int]]:
    """Fault -> the numbers of the mutations that show it."""
    reader = READERS[name]
    shutil.copytree(seeds[reader.seed], folder, symlinks=True)
    file = folder / reader.file
    content = file.read_bytes()
    if file.is_symlink():
        file = file.parent / os.readlink(file)
    assert fault(reader, folder) is None, f"{name}: the seed itself"
    found: dict[str, list[int]] = {}
    for number in numbers:
        rng = random.Random(f"{name} {number}")
        if reader.file.endswith(".safetensors"):
            new = _changed_header(content, rng)
        else:
            new = mutated(content, rng, reader.load, reader.dump)
        file.write_bytes(new)
        if problem := fault(reader, folder):
            found.setdefault(problem, []).append(number)
    return found


def _changed_header(content: bytes, rng: random.Random) -> bytes:
    """A file of safetensors with another header, whose length may be told wrongly."""
    size = struct.unpack("<Q", content[:8])[0]
    header = mutated(content[8 : 8 + size], rng, json.loads, as_json)
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 1 << 40, len(header) + 9))
    return struct.pack("<Q", length) + header + content[8 + size :]


@pytest.mark.parametrize("name", READERS)
def test_a_few_broken_files(name: str, seeds: dict[str, Path], tmp_path: Path) -> None:
    few = 4 if READERS[name].read is _report else 15
    assert tried(name, seeds, tmp_path / "x", range(few)) == {}


def test_broken_files_that_hypothesis_looks_for(seeds: dict[str, Path], tmp_path: Path) -> None:
    """It makes the smallest of what it finds, which a seed of ours cannot."""
    hypothesis = pytest.importorskip("hypothesis", reason="an extra of development")
    names = [name for name, reader in READERS.items() if reader.load and reader.read is not _report]
    folders = {}
    for name in names:
        folders[name] = tmp_path / name.replace(" ", "-")
        shutil.copytree(seeds[READERS[name].seed], folders[name], symlinks=True)

    @hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @hypothesis.given(hypothesis.strategies.sampled_from(names), hypothesis.strategies.randoms())
    def look(name: str, rng: random.Random) -> None:
        reader = READERS[name]
        content = (seeds[reader.seed] / reader.file).read_bytes()
        (folders[name] / reader.file).write_bytes(mutated(content, rng, reader.load, reader.dump))
        assert fault(reader, folders[name]) is None

    look()


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_broken_files(name: str, seeds: dict[str, Path], tmp_path: Path) -> None:
    many = 2000 if "recipe" in name else 500  # these come from strangers
    assert tried(name, seeds, tmp_path / "x", range(many)) == {}
