"""``lmprune.json``: what a folder says of where its weights came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmprune.errors import ModelError
from lmprune.models.checkpoint import Checkpoint
from lmprune.models.locate import ModelFolder
from lmprune.plan import LayerPlan
from lmprune.recipe import Recipe

LINEAGE = "lmprune.json"
"""Written into every checkpoint and adapter of ours."""


def read_lineage(folder: Path, *, remedy: str) -> dict[str, Any]:
    """What ``folder`` says; nothing where it says nothing.

    Raises:
        ModelError: the file cannot be read; ``remedy`` says what to do then.
    """
    path = folder / LINEAGE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as exc:
        raise ModelError(f"cannot read {path}: {exc}. {remedy}") from exc
    return found if isinstance(found, dict) else {}


def cut_lineage(recipe: Recipe, base: ModelFolder, plan: LayerPlan) -> dict[str, Any]:
    """What is said of a cut: the base, the recipe and the layers."""
    return {
        "base": {"model": base.name, "revision": base.revision, "fingerprint": Checkpoint.open(base.path).fingerprint},
        "recipe": {"hash": recipe.hash, "criterion": recipe.criterion, "choice": dict(recipe.choice)},
        "layers": plan.layers,
        "kept": list(plan.kept),
        "dropped": list(plan.dropped),
    }
