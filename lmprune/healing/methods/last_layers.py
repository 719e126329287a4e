"""The last layers and the output head train (Reassessing Layer Pruning in LLMs, ICLR 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmprune.cuts.plan import Plan
from lmprune.errors import UsageError
from lmprune.healing.methods.base import Training, above_zero
from lmprune.settings import check_choice, option

if TYPE_CHECKING:
    from torch import nn

HEADS = ("auto", "train", "frozen")


@dataclass(frozen=True)
class LastLayers(Training):
    """A few layers at the end; all below them stays frozen."""

    last: int = option(3, "last-layers: how many layers train.")
    head: str = option(
        "auto", "last-layers: auto trains lm_head where it has weights of its own; train unties it; frozen leaves it."
    )

    def check(self, method: str) -> None:
        """As in `Options`."""
        super().check(method)
        above_zero(self, "last")
        check_choice("--head", self.head, HEADS)

    def check_model(self, model: nn.Module, cut: Plan | None) -> None:
        """There must be so many layers."""
        from lmprune.models.stack import find_stack

        layers = find_stack(model).layers
        if self.last > len(layers):
            raise UsageError(f"--last {self.last}: this model has {len(layers)} layers")

    def prepare(self, model: nn.Module, cut: Plan | None, seed: int) -> tuple[nn.Module, list[str]]:
        """The last layers, and the head."""
        from lmprune.models.stack import find_stack

        layers = find_stack(model).layers
        for layer in layers[len(layers) - self.last :]:
            layer.requires_grad_(True)
        head, notes = _head(model, self.head)
        if head is not None:
            head.requires_grad_(True)
        return model, notes


def _head(model: Any, wanted: str) -> tuple[nn.Module | None, list[str]]:
    """The output head if it is to train."""
    from torch import nn

    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if wanted == "frozen" or head is None:
        return None, []
    if head.weight is not embeddings.weight:
        return head, []
    if wanted == "auto":
        return None, ["lm_head shares its weights with the embeddings and stays frozen; --head train gives it its own"]
    # Training shared weights would change the input of every layer below, which this method means to leave alone.
    head.weight = nn.Parameter(head.weight.detach().clone())
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    return head, [f"lm_head no longer shares its weights with the embeddings: {head.weight.numel():,} parameters more"]
