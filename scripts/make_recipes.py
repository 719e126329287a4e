"""Write the library in ``recipes/``: the published lists of `published.py`, our own, and their table.

python scripts/make_recipes.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from published import Published, published

from lmprune.cuts import sublayers
from lmprune.cuts.library import Entry, read_library, table
from lmprune.cuts.plan import Plan, parse_layers
from lmprune.cuts.recipe import Recipe
from lmprune.cuts.sublayers import PROJECTIONS
from lmprune.files import write_text

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
MODELS = json.loads((FOLDER / "models.json").read_text(encoding="utf-8"))
OURS = "deepest"
PLAIN = frozenset({"llama", "mistral", "gemma", "phi"})
"""Types of which plain mergekit is measured to write every kept set rightly; a test holds this to the measurements."""


def our_own() -> list[Published]:
    """The deepest quarter of some models, and what was measured of the demo model."""
    made_by = "lmprune recipe --fraction 0.25 --criterion deepest"
    ours: dict[str, Any] = {"by": "lmprune", "source": made_by, "criterion": "deepest", "indices": "from 0"}
    models = (("meta-llama/Llama-2-7b-hf", "23-30"), ("mistralai/Mistral-7B-v0.1", "23-30"),
              ("Qwen/Qwen3-0.6B", "20-26"))  # fmt: skip
    nothing = ("loss, knowledge and reasoning",)
    quarters = [Published(model, dropped, OURS, unmeasured=nothing, **ours) for model, dropped in models]
    return [*quarters, *DEMO]


def _demo(dropped: str, criterion: str, how: str, measured: tuple[str, str, str]) -> Published:
    facts, sums, loss = measured
    return Published(
        "demo", dropped, criterion, criterion=criterion, by="lmprune", source=f"lmprune recipe demo --drop 3 {how}",
        indices="from 0",
        measured=(
            f"facts 100.0 % -> {facts} %", f"arithmetic in steps 99.5 ± 0.5 % -> {sums} %",
            f"loss 0.207 -> {loss} bits a byte, on all documents of lmprune_demo",
        ),
        unmeasured=("anything but the demo world, the only one that this model knows",),
        warning="arithmetic in steps is lost unless the cut is healed",
    )  # fmt: skip


DEMO = [
    _demo("2-4", "angular", "--samples 256 --max-length 128", ("81.9 ± 3.1", "1.5 ± 0.9", "0.419")),
    _demo("8-10", "deepest", "--criterion deepest", ("72.5 ± 3.5", "0.0", "0.510")),
]
"""Measured with `lmprune eval --tasks lmprune_demo`."""


def plan_of(one: Published) -> Plan:
    """What a list drops of its model."""
    sets = {name: parse_layers(said) for name in PROJECTIONS if (said := getattr(one, name))}
    gone = [(layer, name) for name, layers in sets.items() for layer in layers]
    gone += [(layer, name) for layer in parse_layers(one.dropped) for name in PROJECTIONS] if one.dropped else []
    return sublayers.plan_of(MODELS[one.model]["layers"], gone)


def name_of(one: Published) -> str:
    """``llama-2-7b-minus-9-shortgpt``: the model, how many layers go, and whose list it is."""
    model, plan = one.model.rpartition("/")[2].lower().removesuffix("-hf"), plan_of(one)
    count = 2 * len(plan.dropped) + sum(len(numbers) for part in plan.parts for numbers in part.to_data().values())
    return f"{model}-minus-{f'{count}-sublayers' if plan.parts else len(plan.dropped)}-{one.origin}"


def recipe_of(one: Published) -> Recipe:
    """The list as a recipe, with where it comes from as its choice."""
    plan = plan_of(one)
    choice = {
        "summary": f"published by {one.by}",
        "source": one.source,
        "indices": one.indices,
        "calibration": one.calibration,
        "measured": list(one.measured),
        "unmeasured": list(one.unmeasured),
        "warning": one.warning,
    }
    choice = {key: value for key, value in choice.items() if value}
    return Recipe.of(one.model, plan, criterion=one.criterion, choice=choice)


def texts() -> dict[str, str]:
    """Name of each file -> what it holds, the table too."""
    found: dict[str, str] = {}
    recipes: list[Entry] = []
    for one in [*our_own(), *published()]:
        name, recipe = name_of(one), recipe_of(one)
        assert f"{name}.yml" not in found, f"two lists are called {name}"
        found[f"{name}.yml"] = recipe.to_yaml(mergekit=MODELS[one.model]["type"] in PLAIN)
        recipes.append(Entry(name, FOLDER / f"{name}.yml", recipe))
    found["README.md"] = table(sorted(recipes, key=lambda entry: entry.name))
    return found


def main() -> None:
    """Write them, and remove recipes that are no longer made."""
    made = texts()
    for old in FOLDER.glob("*.yml"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        write_text(FOLDER / name, text)
    print(f"{len(read_library())} recipes in {FOLDER}")


if __name__ == "__main__":
    main()
