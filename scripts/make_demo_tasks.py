"""Write the data of the demo tasks from the demo world: ``python scripts/make_demo_tasks.py``.

The files are committed; a test checks that they are what this script writes.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

from lmprune.text import world

DATA = Path(__file__).resolve().parent.parent / "tasks" / "demo" / "data"
SEED = "tasks"
TRAINING = "tasks-training"
"""Seed of the training splits, on which a cut may be chosen."""
PROBLEMS = 200
DOCUMENTS = 120


def facts() -> list[dict[str, Any]]:
    """One multiple-choice question for each held-out fact."""
    rng = random.Random(f"lmprune-choices-{SEED}")
    rows = []
    for question in world.questions(SEED):
        choices = [question.answer, *question.wrong]
        rng.shuffle(choices)
        rows.append({"question": question.text, "choices": choices, "label": choices.index(question.answer)})
    return rows


def asked_facts() -> list[dict[str, Any]]:
    """Multiple-choice questions about other facts: those that training text asks about."""
    rng = random.Random(f"lmprune-choices-{TRAINING}")
    everyone = range(world.PEOPLE)
    pairs = [(who, what) for who in everyone for what in range(len(world.ATTRIBUTES))]
    free = sorted(set(pairs) - world.held_out())
    rows = []
    for who, what in rng.sample(free, PROBLEMS):
        person, attribute = world.people()[who], world.ATTRIBUTES[what]
        answer = person.facts[what]
        choices = [answer, *rng.sample([value for value in attribute.values if value != answer], 3)]
        rng.shuffle(choices)
        text = rng.choice(attribute.questions).format(name=person.name)
        rows.append({"question": text, "choices": choices, "label": choices.index(answer)})
    return rows


def arithmetic() -> list[dict[str, Any]]:
    """Four-step problems with their final numbers."""
    items = itertools.islice(world.problems(SEED), PROBLEMS)
    return [{"question": item.question, "answer": str(item.answer)} for item in items]


def worked_arithmetic() -> list[dict[str, Any]]:
    """Other problems, with their solutions step by step."""
    items = itertools.islice(world.problems(TRAINING), PROBLEMS)
    return [{"question": item.question, "solution": item.solution, "answer": str(item.answer)} for item in items]


def loss() -> list[dict[str, Any]]:
    """Documents of every kind."""
    return [{"text": text} for text in itertools.islice(world.documents(SEED), DOCUMENTS)]


def files() -> dict[str, str]:
    """File name -> its text."""
    tables = {
        "facts": facts(),
        "facts_train": asked_facts(),
        "arithmetic": arithmetic(),
        "arithmetic_train": worked_arithmetic(),
        "loss": loss(),
    }
    return {f"{name}.jsonl": "".join(json.dumps(row) + "\n" for row in rows) for name, rows in tables.items()}


if __name__ == "__main__":
    DATA.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (DATA / name).write_text(text, encoding="utf-8")
