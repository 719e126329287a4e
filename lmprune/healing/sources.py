"""What is healed: a cut, as healing looks at it. Loads no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmprune.cuts.lineage import Lineage
from lmprune.cuts.plan import Plan
from lmprune.errors import UsageError
from lmprune.healing.presets import Facts
from lmprune.models.cut import Cut
from lmprune.models.locate import ModelFolder


@dataclass(frozen=True)
class Source:
    """What is healed."""

    model: Cut

    @property
    def folder(self) -> Path:
        """Where the weights are read from."""
        return self.model.base.path

    @property
    def plan(self) -> Plan | None:
        """What to drop while reading; None where the folder is pruned already."""
        return self.model.plan

    @property
    def cut(self) -> Plan | None:
        """What is missing from the base; None for a model that nobody pruned, or that does not say."""
        return self.model.origin.plan

    @property
    def base(self) -> ModelFolder | None:
        """The unpruned model; None where there is none or it cannot be found."""
        return self.model.origin.base

    @property
    def lineage(self) -> Lineage:
        """The model's own history."""
        return self.model.lineage

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should be told."""
        origin = self.model.origin
        if origin.plan is None:
            return (f"{origin.problem}, so healing it is plain fine-tuning",)
        return (origin.problem,) if origin.problem else ()

    @property
    def dtype(self) -> str | None:
        """The type to write; None keeps the folder's own."""
        return self.model.recipe.dtype if self.model.recipe else None

    @property
    def default_data(self) -> str:
        """The text to heal on when none is named."""
        return self.model.default_data

    @property
    def fingerprint(self) -> str:
        """Of the weights and the plan together."""
        return self.model.fingerprint

    def facts(self) -> Facts:
        """What presets depend on."""
        text = self.model.whole_config.get_text_config()
        layers = self.cut.layers if self.cut else self.model.layers
        share = len(self.cut.dropped) / layers if self.cut else 0.0
        sizes = int(text.hidden_size), int(text.vocab_size)
        return Facts(str(text.model_type), *sizes, layers, share, self.model.window)

    def skeleton(self) -> Any:
        """The model that trains, without its weights."""
        return self.model.empty()

    def require_base(self, why: str) -> tuple[ModelFolder, Plan]:
        """The base and the cut.

        Raises:
            UsageError: they are not known, or the folder's weights are no longer the base's.
        """
        if self.base is None or self.cut is None:
            raise UsageError(f"{why} needs the unpruned model: {self.model.origin.problem}. Heal from a recipe")
        if self.lineage.healed:
            raise UsageError(
                f"{why} needs the base's own weights, but {self.folder} was healed before. Heal from a recipe"
            )
        return self.base, self.cut
