"""What reads a stream that a cut has turned and made narrower: maps behind norms, solved for what they made before.

A norm of the narrow stream gives each token another length than the whole one did, and lacks what was cut away. One map
per norm from the narrow normed states to the whole ones would serve all that reads them; solving each reader for what
the whole model's same reader makes gives just that, since a reader is linear. The head is the exception: a map of the
stream's size stands for it, so that nothing of the vocabulary's size is summed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lmprune.cuts.plan import Plan
from lmprune.cuts.width import Width
from lmprune.forward.calls import entering_any
from lmprune.forward.streaming import OneByOne
from lmprune.healing.fitting import Fitted, Parts, fitted
from lmprune.healing.layerwise import Layerwise, Shelf
from lmprune.healing.writers import Stage, is_linear
from lmprune.models.carrying import Change, changes_of
from lmprune.models.stack import Stack, find_stack
from lmprune.models.width import Slicing, live_source


@dataclass(frozen=True)
class Narrowing:
    """How a student of a smaller hidden size stands to the whole model.

    Attributes:
        stream: (d, k): the student's state should be the whole model's times it.
        stack: the whole model's layers.
        changes: by its name in the whole model, what becomes of each tensor where the student's neurons and heads alone
            are kept, and the stream stays whole.
    """

    stream: Tensor
    stack: Stack
    changes: Mapping[str, Change]

    def reader(self, layer: int, path: str) -> nn.Module:
        """What reads the stream at ``path`` of that layer of the whole model, with the student's neurons and heads."""
        found = copy.copy(self.stack.layers[layer].get_submodule(path))
        found._parameters = dict(found._parameters)
        for leaf, held in found._parameters.items():
            change = self.changes.get(f"{self.stack.path}.{layer}.{path}.{leaf}")
            if held is not None and change is not None:
                found._parameters[leaf] = nn.Parameter(change(held.detach()), requires_grad=False)
        return found

    def narrowed(self, states: Tensor) -> Tensor:
        """What the student's states should be, from the whole model's (..., d)."""
        return (states.to(self.stream.dtype) @ self.stream).to(states.dtype)


@dataclass(frozen=True)
class Readers:
    """Maps of one layer that share one input.

    Attributes:
        paths: in the layer.
        before: how many of the layer's stages have written when they read.
    """

    paths: tuple[str, ...]
    before: int

    def changed(self, layer: nn.Module) -> list[str]:
        """The parameters that a solve may change, by their names in the layer."""
        return [f"{path}.{name}" for path in self.paths for name, _ in layer.get_submodule(path).named_parameters()]


def readers_of(model: Layerwise, place: int, hidden: Tensor, stages: Sequence[Stage]) -> list[Readers]:
    """The maps of layer ``place`` that read the stream through a norm, in the order in which they do."""
    layer = model.layers[place]
    width = hidden.shape[-1]
    calls: list[tuple[str, Tensor]] = []
    with ExitStack() as hooks:
        for path, module in layer.named_modules():
            if is_linear(module):
                hooks.enter_context(entering_any(module, partial(lambda path, x: calls.append((path, x)), path)))
        model.run(place, model.probe, hidden)
    ends = {writer.path: number for number, stage in enumerate(stages, 1) for writer in stage.writers}
    groups: dict[tuple[int, int], list[str]] = {}
    written = 0
    for path, entered in calls:
        if path in ends:
            written = ends[path]
        elif entered.shape[-1] == width:
            groups.setdefault((written, entered.data_ptr()), []).append(path)
    return [Readers(tuple(dict.fromkeys(paths)), before) for (before, _), paths in groups.items()]


@contextmanager
def reading(layer: nn.Module, entered: dict[Readers, Shelf]) -> Iterator[None]:
    """Within the block what enters each group of readers of ``layer`` goes to its list."""

    def take(group: Readers, states: Tensor) -> None:
        entered[group].append(states.detach().clone().cpu())

    with ExitStack() as hooks:
        for group in entered:
            hooks.enter_context(entering_any(layer.get_submodule(group.paths[0]), partial(take, group)))
        yield


def solve_head(head: nn.Module, whole: nn.Module, parts: Parts, ridges: Sequence[float]) -> Fitted:
    """Set the student's ``head``; what was found for the map of the student's normed states to the whole model's.

    Args:
        whole: the whole model's head.
        parts: the student's normed states (tokens, k), and the whole's.
    """
    # The student's head is the whole's after a map of the normed states: found again from the two.
    found = fitted(parts, head_map(whole.weight, head.weight).T, ridges, bias=False)
    if found.ridge is not None:
        turned = found.weight.T  # (d, k)
        with torch.no_grad():
            for mine, theirs in zip(head.weight.split(_ROWS), whole.weight.split(_ROWS)):
                mine.copy_(theirs.to("cpu", torch.float64) @ turned)
    return found


_ROWS = 4096
"""Rows of a head that are in float64 at a time: it has one for each token of the vocabulary."""


def head_map(ours: Tensor, theirs: Tensor) -> Tensor:
    """(k, d): the map of states after which the head ``ours`` (vocabulary, k) is nearest to ``theirs`` (vocabulary, d).

    In float64 on the CPU.
    """
    k, d = ours.shape[1], theirs.shape[1]
    gram, cross = (torch.zeros(k, columns, dtype=torch.float64) for columns in (k, d))
    for mine, other in zip(ours.detach().split(_ROWS), theirs.detach().split(_ROWS)):
        rows = mine.to("cpu", torch.float64)
        gram.addmm_(rows.T, rows)
        cross.addmm_(rows.T, other.to("cpu", torch.float64))
    return torch.linalg.solve(gram, cross)


def head_target(direction: Tensor, normed: Tensor, length: Tensor) -> Tensor:
    """The states (tokens, k) at whose direction a tied head gives the whole model's logits as nearly as it can.

    Args:
        direction: `head_map` of the two heads, (k, d).
        normed: the whole model's states after its last norm, (tokens, d).
        length: (tokens, 1) how long they should be.
    """
    found = normed.double() @ direction.to(normed.device).T
    return (found / found.norm(dim=-1, keepdim=True).clamp_min(1e-12) * length.double()).to(normed.dtype)


def is_tied(model: Any) -> bool:
    """Whether its head shares its weights with its embeddings."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and embedding is not None and head.weight is embedding.weight


def is_turned(plan: Plan) -> bool:
    """Whether the stream of what ``plan`` leaves is another one than the whole model's: narrower, and turned."""
    return _turning(plan) is not None


def _turning(plan: Plan) -> Width | None:
    """The part that does it."""
    return next((part for part in plan.parts if isinstance(part, Width) and part.hidden is not None), None)


def narrowing_of(whole: Any, plan: Plan) -> Narrowing | None:
    """How a student that ``plan`` leaves of the live ``whole`` stands to it; None where its hidden size is the same."""
    if (part := _turning(plan)) is None:
        return None
    assert not isinstance(whole, OneByOne), "such models are live, in memory or in files"
    maps = Slicing.of(part, live_source(whole))
    others = tuple(each for each in plan.parts if each is not part)
    if part.ffn is not None or part.groups is not None:
        others = (*others, replace(part, hidden=None))
    device = whole.get_input_embeddings().weight.device
    changes = changes_of(replace(plan, parts=others), maps.source)
    return Narrowing((maps.writes * maps.written).to(device), find_stack(whole), changes)
