"""Every stage is killed at random moments, and run twice at once: what stands under a final name is whole and right."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lmprune import cli
from lmprune.choosing import write_recipe
from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe
from lmprune.models.cut import open_cut

KILLS = 20
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


def start(words: list[Any], folder: Path) -> int:
    """The command line in a process of its own, which has imported already what this one has."""
    if child := os.fork():
        return child
    try:
        os.chdir(folder)
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        sys.argv = ["lmprune", *map(str, words)]
        cli.main()
    except SystemExit as exc:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(int(exc.code or 0))
    finally:
        os._exit(70)


def finish(child: int, folder: Path) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, (folder / "log.txt").read_text()[-2000:]


@dataclass(frozen=True)
class Stage:
    """A command, the names that it writes, and what of them is the same after every right run."""

    words: Callable[[Path], list[Any]]
    outputs: tuple[str, ...]
    told: Callable[[Path], Any]


def _weights(folder: Path) -> Any:
    return {file.name: file.read_bytes() for file in sorted((folder / "out").glob("*.safetensors"))}


def _scores(folder: Path) -> Any:
    """Of every point that has results: a point is measured whole or not at all."""
    found = {}
    for point in sorted((folder / "run" / "results").iterdir()):
        if not point.name.startswith("."):
            (file,) = point.glob("results_*.json")
            found[point.name] = json.loads(file.read_text())["results"]
    return found


def _page(folder: Path) -> Any:
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", (folder / "r.html").read_text())


def _recipe(folder: Path) -> Any:
    """Also after a kill, a recipe stands with its own base folder."""
    read = Recipe.read(folder / "r.yml")
    config = json.loads((Path(str(read.base_folder)) / "config.json").read_text())
    assert config["num_hidden_layers"] == len(read.plan.kept)
    return read.plan


HEAL = ("--steps", 6, "--batch-size", 2, "--max-length", 32, "--eval-blocks", 2, "--eval-every", 2, "--device", "cpu")
SWEEP = ("--tasks", "lmprune_demo_facts,lmprune_demo_arithmetic", "--limit", 2, "--samples", 8, "--data", "demo")
BENCH = ("--prompts", 8, "--batch-sizes", 1, "--tokens", 2, "--device", "cpu")
STAGES = {
    "profile": Stage(
        lambda base: ["profile", base, "-o", "p.json", "--data", "demo", "--samples", 96, "--batch-size", 1],
        ("p.json",), lambda folder: (folder / "p.json").read_text(),
    ),
    "recipe": Stage(
        lambda base: ["recipe", base, "-o", "r.yml", "--layers", random.choice(["2", "3-4"])], ("r.yml",), _recipe
    ),
    "prune": Stage(lambda base: ["prune", "cut.yml", "out"], ("out",), _weights),
    "heal": Stage(lambda base: ["heal", "cut.yml", "out", "--data", "demo", *HEAL], ("out",), _weights),
    "sweep": Stage(
        lambda base: ["sweep", base, "-o", "run", *SWEEP, "--fractions", "0.25", "--device", "cpu", "--no-bench"],
        ("run/results/baseline",), _scores,
    ),
    "report": Stage(lambda base: ["report", base.parent / "sweep", "-o", "r.html"], ("r.html",), _page),
    "bench": Stage(
        lambda base: ["bench", base, "cut.yml", "-o", "b.json", *BENCH],
        ("b.json",), lambda folder: [row["name"] for row in json.loads((folder / "b.json").read_text())["rows"]],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tiny: Callable[..., Path], sweep_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that needs a base folder, and beside it a finished sweep; all that commands import is imported."""
    import lmprune.demo.walk  # noqa: F401  (every stage)

    root = tmp_path_factory.mktemp("kills")
    os.environ["LMPRUNE_CACHE"] = str(root / "cache")
    kinds = {"layer_types": ["full_attention", "sliding_attention"] * 4}
    shutil.copytree(tiny("qwen3", use_sliding_window=True, sliding_window=64, **kinds), root / "base")
    shutil.copytree(sweep_folder, root / "sweep")
    write_recipe(root / "base", Plan(8, (2,)), root / "cut.yml")
    return root / "base"


def place(base: Path, tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    for file in base.parent.glob("cut*"):
        (shutil.copytree if file.is_dir() else shutil.copyfile)(file, folder / file.name)
    return folder


def leftovers(folder: Path) -> list[str]:
    """What no run should leave: halves, locks, journals and work folders; halves of files stay for an hour."""
    return [path.name for path in folder.rglob(".*") if not (".half-" in path.name and path.is_file())]


@pytest.mark.parametrize("name", STAGES)
def test_killed_and_gone_on(name: str, base: Path, tmp_path: Path) -> None:
    stage, rng = STAGES[name], random.Random(name)
    random.seed(name)
    folder = place(base, tmp_path, "whole")
    began = time.monotonic()
    finish(start(stage.words(base), folder), folder)
    seconds, right = time.monotonic() - began, stage.told(folder)
    folder, killed = place(base, tmp_path, "killed"), 0
    while killed < KILLS:
        child = start(stage.words(base), folder)
        until = time.monotonic() + rng.random() * seconds
        while time.monotonic() < until and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        written = [output for output in stage.outputs if (folder / output).exists()]
        if written:
            _same(name, stage.told(folder), right)
        if written and name not in ("recipe", "sweep"):  # these go on over what is there
            shutil.rmtree(folder / "out", ignore_errors=True)
            [(folder / output).unlink(missing_ok=True) for output in stage.outputs if output != "out"]
        if name == "sweep" and written and stage.told(folder) == right:  # or the next would be over before it is killed
            shutil.rmtree(folder / "run")
    finish(start(stage.words(base), folder), folder)
    _same(name, stage.told(folder), right, whole=True)
    assert leftovers(folder) == []


def _same(name: str, found: Any, right: Any, *, whole: bool = False) -> None:
    if name == "recipe":
        return  # either cut; `_recipe` has looked at it
    if name == "sweep" and not whole:
        assert found.items() <= right.items()
    else:
        assert found == right


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("later", [0.0, 0.5])
def test_two_at_once(name: str, later: float, base: Path, tmp_path: Path) -> None:
    """One of them may be refused, in one line; what is written is that of one alone."""
    stage = STAGES[name]
    random.seed(name)
    folder = place(base, tmp_path, "whole")
    began = time.monotonic()
    finish(start(stage.words(base), folder), folder)
    seconds, right = time.monotonic() - began, stage.told(folder)
    folder = place(base, tmp_path, "two")
    children = [start(stage.words(base), folder)]
    time.sleep(later * seconds)
    children.append(start(stage.words(base), folder))
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert 0 in codes and set(codes) <= {0, 1}, (codes, (folder / "log.txt").read_text()[-2000:])
    _same(name, stage.told(folder), right, whole=True)
    if name == "recipe":
        open_cut(folder / "r.yml")
    assert leftovers(folder) == []
