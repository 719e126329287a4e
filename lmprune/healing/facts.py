"""What settings may depend on. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from lmprune.models.cut import Cut

LARGE = 1024
"""Hidden size from which `quick` divides its rates by ten: large models were trained at smaller rates."""


@dataclass(frozen=True)
class Facts:
    """What a preset may depend on. ``layers`` and ``share`` are the unpruned model's and the cut's."""

    model_type: str
    hidden: int
    vocabulary: int
    layers: int
    share: float
    positions: int | None = None

    @property
    def large(self) -> bool:
        """Whether `quick` is careful with it."""
        return self.hidden >= LARGE

    @classmethod
    def of(cls, cut: Cut) -> Facts:
        """Those of a model that is to be healed."""
        text, plan = cut.whole_config.get_text_config(), cut.origin.plan
        layers, share = (plan.layers, len(plan.dropped) / plan.layers) if plan else (cut.layers, 0.0)
        return cls(str(text.model_type), int(text.hidden_size), int(text.vocab_size), layers, share, cut.window)


ANY = Facts("", 0, 0, 0, 0.0)
"""Of a model of which nothing is known yet."""
