"""The whole path on the embedded model: profile, recipe, prune, heal, evaluate, and one table at the end.

Beside the cut by angular distance, which is repaired and trained for a while, stands the best one of as many layers, as
it is and repaired without training.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmprune.benching.measuring import prefill_speed
from lmprune.choosing import choose, write_recipe
from lmprune.evaluation.harness import evaluate
from lmprune.files import write_json
from lmprune.healing import HealSettings, heal
from lmprune.models.cut import open_cut
from lmprune.models.loading import load_model
from lmprune.models.locate import DEMO
from lmprune.profiling import ProfileSettings, profile_model
from lmprune.text.sources import DataSettings
from lmprune.writing.pruning import prune

_LOG = logging.getLogger(__name__)
TASKS = ("lmprune_demo_loss", "lmprune_demo_facts", "lmprune_demo_arithmetic")
DTYPE = "float32"
"""The same on every CPU."""


@dataclass(frozen=True)
class Row:
    """One model of the final table."""

    model: str
    layers: int
    parameters: int
    bits_per_byte: float
    facts: float
    arithmetic: float
    tokens_per_second: float
    errors: Mapping[str, float | None]
    """Standard errors of what was measured on documents, by name."""

    def to_data(self) -> dict[str, Any]:
        """Plain data, as docs/json.md describes it."""
        said = {name: value for name, value in asdict(self).items() if name not in (*self.errors, "errors")}
        return said | {
            "scores": {name: {"value": getattr(self, name), "error": error} for name, error in self.errors.items()}
        }


@dataclass(frozen=True)
class Walk:
    """What the walk measured and wrote."""

    rows: tuple[Row, ...]
    paths: dict[str, Path]

    def to_data(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "rows": [row.to_data() for row in self.rows],
            "paths": {name: str(path) for name, path in self.paths.items()},
        }


def walk(folder: Path, *, drop: int) -> Walk:
    """Run every stage in ``folder``, reporting each step."""
    base = open_cut(DEMO)
    paths = {
        "profile": folder / "profile.json",
        "recipe": folder / "recipe.yml",
        "pruned": folder / "pruned",
        "healed": folder / "healed",
        "best": folder / "best.yml",
        "repaired": folder / "repaired",
        "results": folder / "results",
    }
    _LOG.info("profile: angular distance between the inputs of all pairs of layers")
    settings = ProfileSettings(samples=256, max_length=128, token="all", drop=drop, dtype=DTYPE)
    measured = profile_model(base, paths["profile"], settings, DataSettings())
    choice = choose(base, "angular", drop=drop, profile=measured)
    _LOG.info(f"recipe: {choice.plan.describe()}; {choice.reason}")
    write_recipe(base, choice, paths["recipe"])
    _LOG.info("prune: mergekit writes the smaller checkpoint, which is read back and proven")
    prune(paths["recipe"], paths["pruned"])
    _LOG.info("heal: a repair of the pruned model, then training")
    short = HealSettings(steps=150, dtype=DTYPE)
    heal(paths["pruned"], paths["healed"], short, DataSettings())

    _LOG.info("recipe: the best cut that can be found, by text and by the model's own answers")
    best = choose(base, "best", drop=drop, settings=ProfileSettings(samples=64, max_length=128, dtype=DTYPE))
    _LOG.info(f"recipe: {best.plan.describe()}; {best.reason}")
    write_recipe(base, best, paths["best"])
    _LOG.info("repair: closed forms on the best cut, which train nothing")
    heal(paths["best"], paths["repaired"], HealSettings(method="refit", dtype=DTYPE), DataSettings())

    evaluated = {
        "original": {"pretrained": DEMO},
        "pruned": {"pretrained": DEMO, "recipe": str(paths["recipe"])},
        "healed": {"pretrained": str(paths["healed"])},
        "best cut": {"pretrained": DEMO, "recipe": str(paths["best"])},
        "repaired": {"pretrained": str(paths["repaired"])},
    }
    scores = {}
    for name, model_args in evaluated.items():
        _LOG.info(f"evaluate: lm_eval on the {name} model")
        scores[name] = evaluate(model_args | {"dtype": DTYPE}, TASKS, batch_size=50)
        write_json(
            paths["results"] / f"{name.replace(' ', '-')}.json", json.loads(json.dumps(scores[name], default=str))
        )
    models = [load_model(path, dtype=DTYPE) for path in (base.base.path, paths["pruned"], paths["healed"])]
    models += [open_cut(paths["best"]).load(dtype=DTYPE), load_model(paths["repaired"], dtype=DTYPE)]
    _LOG.info("speed: forward passes of all in turns")
    speeds = prefill_speed(models)
    rows = tuple(
        _row(name, model, scores[name]["results"], speed) for name, model, speed in zip(evaluated, models, speeds)
    )
    return Walk(rows, paths)


def _row(name: str, model: Any, results: dict[str, Any], speed: float) -> Row:
    metrics = {
        "bits_per_byte": ("lmprune_demo_loss", "bits_per_byte,none"),
        "facts": ("lmprune_demo_facts", "acc,none"),
        "arithmetic": ("lmprune_demo_arithmetic", "exact_match,answer"),
    }
    errors = {}
    for ours, (task, metric) in metrics.items():
        error = results[task].get(metric.replace(",", "_stderr,"))
        errors[ours] = error if isinstance(error, float) else None
    return Row(
        model=name,
        layers=model.config.num_hidden_layers,
        parameters=model.num_parameters(),
        **{ours: results[task][metric] for ours, (task, metric) in metrics.items()},
        tokens_per_second=speed,
        errors=errors,
    )
