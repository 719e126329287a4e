"""Repairs that cannot be, through the command line: one line, an exit code, and nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_beside import Run
from test_beside import run as run

from lmprune.choosing import write_recipe
from lmprune.cuts.plan import Plan
from lmprune.models.cut import open_cut
from lmprune.writing.pruning import prune

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ("--max-length", "32", "--eval-blocks", "4", "--fit-blocks", "8")
DEMO = ("--data", "demo", *SMALL)


@pytest.fixture
def recipe(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """Of a tiny Llama in the test's own folder, without layers 3 and 4."""
    shutil.copytree(tiny("llama"), tmp_path / "base")
    write_recipe(open_cut(tmp_path / "base"), Plan(8, (3, 4)), tmp_path / "r.yml")
    return tmp_path / "r.yml"


@pytest.fixture
def alike(tmp_path: Path) -> tuple[str, ...]:
    """Text whose states say next to nothing of a map, and other text to measure on."""
    (tmp_path / "alike.txt").write_text("a" * 4000)
    return ("--data", str(tmp_path / "alike.txt"), "--eval-data", "demo", *SMALL[:4], "--fit-blocks", "16")


@pytest.mark.parametrize("method", ["refit", "ghost", "streamline"])
def test_a_base_that_is_gone_is_asked_for(method: str, recipe: Path, tmp_path: Path, run: Run) -> None:
    prune(recipe, tmp_path / "pruned", check=False)
    shutil.rmtree(tmp_path / "base")
    before = sorted(tmp_path.iterdir())
    for given, wanted, what_to_do in (
        ("pruned", f"{method} needs the unpruned model: its base", "Heal from the recipe"),
        ("r.yml", "is of a model that is not where it says", "--rebase"),
    ):
        code, _, told = run("heal", tmp_path / given, tmp_path / "out", "--method", method, *DEMO)
        assert code in (1, 2) and len(told.strip().splitlines()) == 1, told
        assert wanted in told and what_to_do in told and str(tmp_path / "base") in told
    assert sorted(tmp_path.iterdir()) == before


def test_a_checkpoint_in_few_bits_is_not_repaired_in_place(recipe: Path, tmp_path: Path, run: Run) -> None:
    prune(recipe, tmp_path / "pruned", check=False)
    code, _, told = run(
        "quantize", tmp_path / "pruned", tmp_path / "few", "--quantization", "int8",
        "--data", "demo", "--samples", "2", "--max-length", "16",
    )  # fmt: skip
    assert code == 0, told
    before = sorted(tmp_path.iterdir())
    for method in ("refit", "ghost", "streamline"):
        code, _, told = run("heal", tmp_path / "few", tmp_path / "out", "--method", method, *DEMO)
        assert code == 2 and len(told.strip().splitlines()) == 1, told
        assert f"those of {tmp_path / 'few'} are stored in few bits. Repair the unquantised model" in told
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("ghost", "--ridge", "0"), "ghost: 512 states before layer 3 leave the solve singular. Give a larger --ridge"),
        (
            ("refit", "--ridges", "1e-20", "--last-for", "states"),
            "layer 2 mlp.down_proj: 512 tokens leave the solve singular, and no other projection gains",
        ),
    ],
    ids=lambda words: words[0] if isinstance(words, tuple) else "",
)
def test_a_singular_system_is_said(
    words: tuple[str, ...], said: str, recipe: Path, alike: tuple[str, ...], tmp_path: Path, run: Run
) -> None:
    code, _, told = run("heal", recipe, tmp_path / "out", "--method", *words, *alike)
    assert code == 1 and said in told.splitlines()[-1] and not (tmp_path / "out").exists(), told


def test_what_is_no_help_is_told_with_its_figures(recipe: Path, tmp_path: Path, run: Run) -> None:
    before = sorted(tmp_path.iterdir())
    code, out, told = run("heal", recipe, tmp_path / "out", "--method", "laco", *DEMO)
    line = told.splitlines()[-1]
    assert code == 1 and not out and "Traceback" not in told
    assert "--method laco does not help this cut: held-out loss " in line and line.endswith("Nothing was written")
    pruned, repaired = (float(word) for word in line.split() if word.replace(".", "").isdigit())
    assert repaired >= pruned > 0
    assert sorted(tmp_path.iterdir()) == before
