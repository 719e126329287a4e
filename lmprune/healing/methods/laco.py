"""LaCo: the layers that go are merged into the one before them (arXiv 2402.11187); nothing trains, no text is read.

The formula is W_l + sum over k of (W_{l+k} - W_l), for every linear map of a layer; norms stay the layer's own. The
published code subtracts weights that it has changed already, so that its sum telescopes and the last layer of each
group takes the place of the first: `code` does the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmprune.cuts.plan import Plan, runs
from lmprune.errors import ModelError, UsageError
from lmprune.healing.methods.base import Repairing
from lmprune.settings import check_choice, option

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmprune.healing.repairing import Repair

RULES = ("formula", "code")


@dataclass(frozen=True)
class Laco(Repairing):
    """Of each gap the layer before it takes what the layers within it differ from it by."""

    merge_rule: str = option("formula", "laco: formula, the paper's; or code, what its published code does.")

    def check(self, method: str) -> None:
        """As in `Options`."""
        super().check(method)
        check_choice("--merge-rule", self.merge_rule, RULES)

    def check_model(self, model: Any, cut: Plan | None) -> None:
        """There must be a layer before the cut."""
        if cut is not None and 0 in cut.dropped:
            raise UsageError("laco merges into the layer before each cut, and this cut starts at layer 0. Use refit")

    def repair(self, work: Repair) -> Mapping[str, Any]:
        """As in `Repairing`."""
        from lmprune.models.stack import find_stack

        ours, theirs = find_stack(work.student).layers, find_stack(work.whole).layers
        places = {layer: place for place, layer in enumerate(work.plan.kept)}
        merged = []
        for start, stop in runs(work.plan.dropped):
            gone = [linear_maps(theirs[layer]) for layer in range(start, stop)]
            merge(linear_maps(ours[places[start - 1]]), gone, self.merge_rule, f"layers {start - 1} to {stop - 1}")
            merged.append({"into": start - 1, "layers": list(range(start, stop))})
        return {"merged": merged}


def linear_maps(layer: nn.Module) -> dict[str, Tensor]:
    """The weights and biases of a layer that are none of a norm's, by name."""
    vectors = {name.rpartition(".")[0] for name, p in layer.named_parameters() if p.dim() > 1}
    return {n: p.data for n, p in layer.named_parameters() if p.dim() > 1 or n.rpartition(".")[0] in vectors}


def merge(into: Mapping[str, Tensor], gone: list[dict[str, Tensor]], rule: str, which: str) -> None:
    """Change the tensors of ``into`` by those of the layers that go, in place.

    Raises:
        ModelError: the layers do not have the same tensors.
    """
    for other in gone:
        if {n: t.shape for n, t in other.items()} != {n: t.shape for n, t in into.items()}:
            raise ModelError(f"{which} are of several kinds, which cannot be merged. Use refit")
    for name, weight in into.items():
        if rule == "code":
            weight.copy_(gone[-1][name])
        else:
            weight.add_(sum(other[name] - weight for other in gone))
