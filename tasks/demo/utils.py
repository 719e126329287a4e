"""Local data and the loss metric for the demo tasks. Found by path, so that they work from any directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

_DATA = Path(__file__).resolve().parent / "data"


def _load(name: str) -> dict[str, datasets.Dataset]:
    lines = (_DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}


def facts(**_: Any) -> dict[str, datasets.Dataset]:
    """Questions about facts that training text states but never asks."""
    return _load("facts")


def arithmetic(**_: Any) -> dict[str, datasets.Dataset]:
    """Four-step problems that training text does not contain."""
    return _load("arithmetic")


def loss(**_: Any) -> dict[str, datasets.Dataset]:
    """Documents of every kind, by a seed that training does not use."""
    return _load("loss")
