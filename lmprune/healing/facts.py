"""What settings may depend on. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from lmprune.models.cut import Cut

LARGE = 1024
"""Hidden size from which not all weights are trained unasked."""
GROWN = 512
"""Hidden size from which rates are a tenth: models of text at large were trained at smaller ones than toys."""


@dataclass(frozen=True)
class Facts:
    """What a preset may depend on.

    Attributes:
        layers, share: the unpruned model's layers, and the share of them that is gone.
        positions: the tokens that it reads at most; None where that has no limit.
        repairable: whether a closed form can compare it with the unpruned model, layer by layer, and nobody waits.
    """

    model_type: str
    hidden: int
    vocabulary: int
    layers: int
    share: float
    positions: int | None = None
    repairable: bool = False

    @property
    def large(self) -> bool:
        """Whether it is too large for all of it to be trained unasked."""
        return self.hidden >= LARGE

    @property
    def grown(self) -> bool:
        """Whether rates are to be careful."""
        return self.hidden >= GROWN

    @classmethod
    def of(cls, cut: Cut) -> Facts:
        """Those of a model that is to be healed."""
        from lmprune.healing.machine import alone

        text, plan = cut.whole_config.get_text_config(), cut.origin.plan
        layers, share = (plan.layers, len(plan.dropped) / plan.layers) if plan else (cut.layers, 0.0)
        repairable = (
            plan is not None
            and bool(plan.dropped or plan.parts)
            and cut.origin.base is not None
            and not cut.lineage.healed
            and cut.adapter is None
            and getattr(text, "quantization_config", None) is None
            and alone()
        )
        return cls(
            str(text.model_type),
            int(text.hidden_size),
            int(text.vocab_size),
            layers,
            share,
            cut.window,
            repairable,
        )


ANY = Facts("", 0, 0, 0, 0.0, repairable=True)
"""Of a model of which nothing is known yet."""
