"""Local data and the loss metric for the demo tasks. Found by path, so that they work from any directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

_DATA = Path(__file__).resolve().parent / "data"


def _load(**splits: str) -> dict[str, datasets.Dataset]:
    files = {split: (_DATA / f"{name}.jsonl").read_text(encoding="utf-8") for split, name in splits.items()}
    return {split: datasets.Dataset.from_list([*map(json.loads, text.splitlines())]) for split, text in files.items()}


def facts(**_: Any) -> dict[str, datasets.Dataset]:
    """Questions about facts that training text states but never asks."""
    return _load(test="facts", train="facts_train")


def arithmetic(**_: Any) -> dict[str, datasets.Dataset]:
    """Four-step problems that training text does not contain."""
    return _load(test="arithmetic", train="arithmetic_train")


def loss(**_: Any) -> dict[str, datasets.Dataset]:
    """Documents of every kind, by a seed that training does not use."""
    return _load(test="loss")
