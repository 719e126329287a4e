"""LoRA on the projections of every layer: with the paper's rank as alpha, on the FFN (arXiv 2403.17887, appendix A)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lmprune.cuts.plan import Plan
from lmprune.errors import UsageError
from lmprune.healing.methods.base import Agreement, Merging, Training, above_zero, not_negative
from lmprune.settings import check_shared, option

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Lora(Training):
    """Low-rank updates of frozen weights, merged into them at the end."""

    rank: int = option(64, "LoRA rank.")
    alpha: float = option(None, "LoRA alpha. Default: the rank, as in the paper.")
    dropout: float = option(0.0, "LoRA dropout.")
    targets: str = option("ffn", "Where LoRA sits: ffn, attention, all, or names such as q_proj,v_proj.")
    quantization: Literal["nf4", "int8"] | None = option(
        None,
        "Hold the frozen weights in few bits while training: nf4 or int8. Default: nf4 for qlora, else neither.",
        metavar="Q",
    )

    adapter: ClassVar[bool] = True
    rate: ClassVar[float] = 2e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._settle("alpha", self.rank)

    @property
    def lighter(self) -> str | None:
        """LoRA on quantised weights."""
        return super().lighter if self.quantization is None else None

    def check(self, method: str) -> None:
        """As in `Options`."""
        super().check(method)
        above_zero(self, "rank", "alpha")
        not_negative(self, "dropout")
        if self.dropout >= 1:
            raise UsageError(f"--dropout {self.dropout}: give a share below 1")
        check_shared(self)

    def check_model(self, model: nn.Module, cut: Plan | None) -> None:
        """The projections must be there, and be modules."""
        self._modules(model)

    def prepare(self, model: nn.Module, cut: Plan | None, seed: int) -> tuple[nn.Module, list[str]]:
        """The model within an adapter. It is cut already: an adapter made before would carry layers that are gone."""
        from lmprune.models.adapters import add_lora

        modules = self._modules(model)
        return add_lora(model, rank=self.rank, alpha=self.alpha, dropout=self.dropout, modules=modules, seed=seed), []

    def merge(self, student: nn.Module | None, merging: Merging) -> tuple[Any, Agreement]:
        """The adapter, kept in a folder, merged into the unquantised weights."""
        return merging.take_adapter()

    def _modules(self, model: nn.Module) -> list[str]:
        from lmprune.healing.targets import resolve_targets
        from lmprune.models.stack import find_stack

        return resolve_targets(find_stack(model).layers, self.targets)
