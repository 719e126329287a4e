"""Weights that people use: Gemma 3 270M, from a file that ``python -m benchmarks.weights`` makes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lmprune
from lmprune.models.cut import open_cut

FILE = "LMPRUNE_GEMMA"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FILE not in os.environ, reason=f"{FILE} names no gemma-3-270m.Q4_K_M.gguf"),
]
DOCS = Path(__file__).parent.parent / "docs"
CHANCE = {"lmprune_world_facts": 0.25, "lmprune_world_sums": 0.05, "lmprune_world_copies": 0.05}
"""At most, by guessing."""


@pytest.fixture(scope="module")
def gemma() -> str:
    pytest.importorskip("gguf")
    return os.environ[FILE]


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the docs say, without their tables and code."""
    file = tmp_path_factory.mktemp("text") / "docs.txt"
    told = [part for page in sorted(DOCS.glob("*.md")) for part in page.read_text(encoding="utf-8").split("\n\n")]
    prose = [" ".join(part.split()) for part in told if part[0].isalpha() and len(part) > 200]
    file.write_text("\n\n".join(prose) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def recipe(gemma: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cut by angular distance of the model's docs: layers 14 to 16."""
    file = tmp_path_factory.mktemp("cut") / "cut.yml"
    lmprune.write_recipe(gemma, lmprune.Plan(18, (14, 15, 16)), file)
    return file


@pytest.mark.parametrize("task", CHANCE)
def test_the_whole_model_is_well_above_guessing(gemma: str, task: str) -> None:
    found = lmprune.evaluate(gemma, [task], limit=24)["results"][task]
    (score,) = (value for key, value in found.items() if key.startswith(("acc,", "exact_match,")))
    assert score > CHANCE[task] + 0.3


def test_the_written_cut_is_the_live_one(recipe: Path, tmp_path: Path) -> None:
    written = lmprune.prune(recipe, tmp_path / "out")
    assert written.path == tmp_path / "out" and written.proof is not None
    stock: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = open_cut(recipe).tokenizer()("Layers that a model hardly needs", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, open_cut(recipe).load(dtype="float32")(ids).logits)
    assert stock.config.num_hidden_layers == 15


def test_a_refit_closes_half_of_the_gap(recipe: Path, english: Path, tmp_path: Path) -> None:
    """Post-norm blocks, a beginning-of-text token and a vocabulary of 262,144."""
    how = lmprune.HealSettings(method="refit", fit_blocks=48, eval_blocks=8, max_length=128)
    done = lmprune.heal(recipe, tmp_path / "out", how, lmprune.DataSettings(data=str(english)))
    assert done.original < done.healed < done.pruned
    assert done.gap_closed is not None and done.gap_closed > 0.5
