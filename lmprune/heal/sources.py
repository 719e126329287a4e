"""Which weights are healed, where they were cut, and which unpruned model they came from. Loads no weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmprune.errors import ModelError, NetworkError, UsageError
from lmprune.heal.presets import Facts
from lmprune.models.applying import plan_for
from lmprune.models.checkpoint import Checkpoint, read_config
from lmprune.models.fields import layer_count
from lmprune.models.lineage import LINEAGE, cut_lineage, read_lineage
from lmprune.models.loading import context_window, cut_config, empty_model, load_config
from lmprune.models.locate import DEMO, ModelFolder, locate
from lmprune.plan import LayerPlan
from lmprune.recipe import Recipe


@dataclass(frozen=True)
class Source:
    """What is healed.

    Attributes:
        folder: where the weights are read from.
        plan: what to drop while reading; None where the folder is pruned already.
        cut: what is missing from the base; None for a model that nobody pruned, or that does not say.
        base: the unpruned model; None where there is none or it cannot be found.
        lineage: the folder's own history.
        notes: what the user should be told.
        dtype: the type to write; None keeps the folder's own.
    """

    folder: Path
    plan: LayerPlan | None = None
    cut: LayerPlan | None = None
    base: ModelFolder | None = None
    lineage: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    dtype: str | None = None

    @property
    def base_name(self) -> str | None:
        """What the user calls the base."""
        named = (self.lineage.get("base") or {}).get("model")
        return self.base.name if self.base else named if isinstance(named, str) else None

    @property
    def default_data(self) -> str:
        """The text to heal on when none is named."""
        return "demo" if self.base_name == DEMO or (self.cut is None and self.folder == locate(DEMO).path) else "c4"

    @property
    def fingerprint(self) -> str:
        """Of the weights and the plan together."""
        kept = "" if self.plan is None else f" {self.plan.kept}"
        return Checkpoint.open(self.folder).fingerprint + kept

    def facts(self) -> Facts:
        """What presets depend on."""
        config = load_config(self.folder)
        text = config.get_text_config()
        layers = self.cut.layers if self.cut else layer_count(config.to_dict())
        share = len(self.cut.dropped) / layers if self.cut else 0.0
        sizes = int(text.hidden_size), int(text.vocab_size)
        return Facts(str(text.model_type), *sizes, layers, share, context_window(config))

    def skeleton(self) -> Any:
        """The model that trains, without its weights."""
        config = load_config(self.folder)
        return empty_model(cut_config(config, self.plan) if self.plan else config)

    def require_base(self, why: str) -> tuple[ModelFolder, LayerPlan]:
        """The base and the cut.

        Raises:
            UsageError: they are not known, or the folder's weights are no longer the base's.
        """
        if self.base is None or self.cut is None:
            reason = self.notes[0] if self.notes else f"{self.folder} does not say what it was cut from"
            raise UsageError(f"{why} needs the unpruned model: {reason}. Heal with --recipe recipe.yml OUT")
        if self.lineage.get("stage") == "heal":
            raise UsageError(f"{why} needs the base's own weights, but {self.folder} was healed before. Use --recipe")
        return self.base, self.cut


def from_recipe(path: Path | str) -> Source:
    """Heal straight from the base model, cut in memory."""
    recipe = Recipe.read(path)
    base = locate(recipe.model, recipe.revision)
    plan = plan_for(recipe, base, load_config(base.path).to_dict())
    lineage = cut_lineage(recipe, base, plan)
    return Source(base.path, plan, plan, base, lineage, dtype=recipe.dtype)


def from_folder(model: str) -> Source:
    """Heal a checkpoint that ``lmprune prune`` wrote, or any other model."""
    folder = locate(model).path
    lineage = read_lineage(folder, remedy="Prune again, or remove it")
    if not lineage.get("dropped"):
        return Source(folder, notes=(f"{model} is not a pruned model of lmprune, so healing it is plain fine-tuning",))
    try:
        cut = LayerPlan(int(lineage["layers"]), tuple(map(int, lineage["dropped"])))
    except (KeyError, TypeError, ValueError) as exc:
        raise ModelError(f"{folder / LINEAGE} does not say what was cut: {exc!r}. Prune again, or remove it") from exc
    if layer_count(read_config(folder)) != len(cut.kept):
        raise ModelError(f"{folder / LINEAGE} speaks of {len(cut.kept)} layers, but config.json of others. Prune again")
    base, problem = _find_base(lineage.get("base"))
    return Source(folder, None, cut, base, lineage, (problem,) if problem else ())


def _find_base(named: Any) -> tuple[ModelFolder | None, str | None]:
    """The base, or None and why."""
    if not isinstance(named, dict) or not named.get("model"):
        return None, "its history does not name its base"
    name = str(named.get("model"))
    try:
        base = locate(name, named.get("revision"))
        same = Checkpoint.open(base.path).fingerprint == named.get("fingerprint")
    except (ModelError, NetworkError) as exc:
        return None, f"its base {name!r} cannot be found ({exc})"
    return (base, None) if same else (None, f"{name!r} no longer holds the weights that were cut")
