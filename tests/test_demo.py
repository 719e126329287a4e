"""The embedded model is what its card says, and the world is the same everywhere."""

from __future__ import annotations

import hashlib
import json
import re
from itertools import islice
from typing import Any

import pytest

from lmprune.models.checkpoint import Checkpoint, read_config
from lmprune.models.locate import demo_folder, locate
from lmprune.text import world


def test_the_world_is_the_same_on_every_machine() -> None:
    text = "\n".join(islice(world.documents(0), 200))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "31f26e8b4dc85428"
    assert len(world.people()) == len({person.name for person in world.people()}) == world.PEOPLE


def test_held_out_questions_are_never_asked_in_training_text() -> None:
    hidden = {
        question.format(name=world.people()[who].name)
        for who, what in world.held_out()
        for question in world.ATTRIBUTES[what].questions
    }
    for text in islice(world.documents("train-0-0"), 3000):
        for asked in re.findall(r"Question: (.*)", text):
            assert asked not in hidden


def test_problems_are_right_and_stay_in_range() -> None:
    for item in islice(world.problems("check"), 300):
        steps = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)\.", item.solution)
        assert len(steps) == 4
        for a, sign, b, c in steps:
            assert int(a) + (int(b) if sign == "+" else -int(b)) == int(c)
            assert 0 <= int(c) <= world.LARGEST_NUMBER
        assert item.solution.endswith(f"Answer: {item.answer}.") and int(steps[-1][3]) == item.answer
        assert all(int(before[3]) == int(after[0]) for before, after in zip(steps, steps[1:]))


def test_the_embedded_model_has_the_promised_shape() -> None:
    config = read_config(demo_folder())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and len(config["layer_types"]) >= 12
    weights = Checkpoint.open(demo_folder())
    assert weights.bytes < 8_000_000 and 2e6 < weights.bytes / 2 < 4e6
    assert {entry.dtype for entry in weights.tensors.values()} == {"BF16"}
    assert locate("demo").name == "demo"


def test_the_card_shows_what_the_paper_is_about() -> None:
    card = (demo_folder() / "README.md").read_text()
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+)% \| ([\d.]+)% \|$", card, re.MULTILINE)
    whole, *single = [(float(loss), float(facts), float(sums)) for _, loss, facts, sums in rows]
    assert len(single) >= 12
    assert whole[1] >= 95 and whole[2] >= 80
    costs = sorted(loss - whole[0] for loss, _, _ in single)
    assert costs[0] < 0.05 and costs[-1] > 1.0


@pytest.mark.slow
def test_the_card_can_be_measured_again() -> None:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
    from train_demo import HeldOut

    from lmprune.models.loading import load_model, load_tokenizer

    measured = HeldOut(load_tokenizer(demo_folder()))(load_model(demo_folder()))
    (stated,) = re.findall(r"^\| none \| ([\d.]+) \|", (demo_folder() / "README.md").read_text(), re.MULTILINE)
    assert abs(measured["held_out_loss"] - float(stated)) < 0.005


def test_the_log_is_of_one_run() -> None:
    from pathlib import Path

    log = Path(__file__).parent.parent / "docs" / "demo_training_log.jsonl"
    rows: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))
    assert rows[-1]["facts"] >= 0.95 and rows[-1]["arithmetic"] >= 0.8


@pytest.mark.slow
def test_the_whole_walk(run: Any, tmp_path: Any) -> None:
    done = json.loads(run("lmprune", "demo", tmp_path / "walk", "--json").stdout)
    rows = [row | {name: one["value"] for name, one in row["scores"].items()} for row in done["rows"]]
    original, pruned, healed, best, repaired = rows
    assert all(row["scores"][name]["error"] is not None for row in rows for name in ("facts", "arithmetic"))
    assert best["model"] == "best cut" and best["layers"] == repaired["layers"] == pruned["layers"]
    assert best["bits_per_byte"] < pruned["bits_per_byte"] and best["arithmetic"] > 0.5 > pruned["arithmetic"]
    assert repaired["bits_per_byte"] < best["bits_per_byte"]
    assert repaired["facts"] >= 0.95 and repaired["arithmetic"] >= 0.95, "a quarter of the layers, and nothing trained"
    assert pruned["layers"] < original["layers"] and pruned["parameters"] < original["parameters"]
    assert original["bits_per_byte"] < pruned["bits_per_byte"]
    assert healed["bits_per_byte"] < pruned["bits_per_byte"]
