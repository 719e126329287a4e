"""What the methods that make patches have in common: states at the cuts, and a recipe with a file beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from lmprune.cuts.beside import Beside
from lmprune.cuts.patch import Patch
from lmprune.cuts.plan import Plan, runs
from lmprune.cuts.recipe import Recipe
from lmprune.errors import UsageError
from lmprune.forward.batches import Batch
from lmprune.forward.calls import decoder_of, evaluating, run_decoder, watching
from lmprune.models.cut import Cut
from lmprune.models.locate import RECIPE
from lmprune.models.patches import changes_of, put_behind
from lmprune.models.stack import find_stack

_BATCH = 8


@dataclass(frozen=True)
class Gap:
    """Layers that are gone in a row, by the whole model's numbers: from ``first`` on, up to ``next``, which is kept."""

    first: int
    next: int

    @property
    def after(self) -> int:
        """The layer behind which the patch stands."""
        return self.first - 1


def gaps_of(plan: Plan) -> list[Gap]:
    """Those of a plan; the last may end behind the last layer."""
    return [Gap(first, stop) for first, stop in runs(plan.dropped)]


def states_at(
    whole: nn.Module, gaps: Sequence[Gap], blocks: NDArray[np.int32] | Sequence[NDArray[np.int32]]
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """For each batch and gap what enters it and what leaves it in the ``whole`` model, (tokens, width) each.

    Padding is no text. Each block is read once.
    """
    stack, decoder = find_stack(whole), decoder_of(whole)
    device = next(decoder.parameters()).device
    wanted = {place for gap in gaps for place in (gap.first, gap.next)}
    with evaluating(whole), torch.no_grad():
        for start in range(0, len(blocks), _BATCH):
            batch = Batch.of([np.asarray(row) for row in blocks[start : start + _BATCH]], device)
            found: dict[int, Tensor] = {}

            def take(place: int, state: Tensor, batch: Batch = batch, found: dict[int, Tensor] = found) -> None:
                if place in wanted:
                    found[place] = batch.real(state)

            with watching(stack.layers, take):
                run_decoder(decoder, batch)
            yield [(found[gap.first], found[gap.next]) for gap in gaps]


def put_into(student: nn.Module, plan: Plan, maps: Mapping[str, Tensor]) -> None:
    """Have the live ``student`` apply ``maps``, the tensors of a patch's file."""
    layers = find_stack(student).layers
    for layer, change in changes_of(maps, [gap.after for gap in gaps_of(plan)], "the patch").items():
        put_behind(layers[plan.kept.index(layer)], change.to(next(student.parameters()).device))


def write_patched(cut: Cut, plan: Plan, method: str, maps: Mapping[str, Tensor], folder: Path) -> Cut:
    """The recipe of ``cut`` with a patch of ``maps``, in ``folder``; opened.

    Raises:
        OutputError: it cannot be written.
    """
    file = f"{RECIPE.removesuffix('.yml')}.{Patch.kind}.safetensors"
    tensors = {name: tensor.detach().cpu().float().contiguous() for name, tensor in maps.items()}
    beside = Beside.of(save(tensors), file, folder)
    patch = Patch(beside, tuple(gap.after for gap in gaps_of(plan)), method)
    told = cut.lineage
    recipe = cut.recipe or Recipe.of(
        told.base.model or cut.base.name, plan, revision=told.base.revision, fingerprint=told.base.fingerprint,
        criterion=told.recipe.get("criterion"), choice=told.recipe.get("choice") or {},
    )  # fmt: skip
    recipe = replace(recipe, layers=plan.layers, parts=(*plan.parts, patch), base_folder=None)
    recipe.write(folder / RECIPE)
    base = cut.origin.base
    assert base is not None, "the method needs it"
    whole = Cut(base, None, None, base.name, None, cut.trust_remote_code)
    return replace(whole, plan=recipe.plan, recipe=recipe, name=str(folder / RECIPE))


def check_unpatched(cut: Cut, method: str) -> None:
    """Refuse a second patch.

    Raises:
        UsageError: there is one.
    """
    plan = cut.origin.plan
    for part in plan.parts if plan is not None else ():
        if isinstance(part, Patch):
            raise UsageError(f"--method {method}: {cut.name} has {part.describe()} already. Give the recipe without it")
