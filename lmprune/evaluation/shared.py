"""One load of a base model, many pruned models of it, and one pass over what they have in common.

Everything but the sharing is the harness's: `_loglikelihood_tokens` and `generate_until` run unmodified for each model,
on the very batches that a separate run would make, so that the numbers are the same.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe
from lmprune.evaluation.plugin import LmpruneLM
from lmprune.forward.tree import Turn, walk
from lmprune.forward.views import pruned_view
from lmprune.models.stack import find_stack

Answer = tuple[float, bool]
"""Log-probability of a continuation, and whether it is the likeliest."""


@dataclass(frozen=True)
class Cut:
    """A pruned model of the sweep; without a recipe, the base itself."""

    name: str
    plan: Plan | None = None
    recipe: Path | None = None


class SharedLM(LmpruneLM):
    """Several pruned models of one base. `use` chooses which of them the harness sees.

    Scoring requests are answered for all models at once and remembered until each has asked for them.

    Args:
        pretrained: the base, as for `LmpruneLM`.
        cuts: the models.
        journal: a file that keeps answers over an interruption.
        share: whether layers in common are computed once.
    """

    _turn: Turn | None = None  # whose states `_model_call` hands on; None while the harness generates

    def __init__(
        self, pretrained: str, cuts: list[Cut], *, journal: Path | None = None, share: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(pretrained, **kwargs)
        if self.batch_size == "auto":
            self.batch_size_per_gpu: Any = self._detect_batch_size()
        self.share = share
        self._whole = self.lmprune_cut
        self._cuts = {cut.name: cut for cut in cuts}
        self._models = {cut.name: pruned_view(self._model, cut.plan) for cut in cuts}
        self._layers = {name: list(find_stack(model).layers) for name, model in self._models.items()}
        self._depth = len(find_stack(self._model).layers)
        self._memory = _Answers(journal)
        self._states: dict[int, Any] = {}
        self._proven = not share
        self.use(cuts[0].name)

    def use(self, name: str) -> None:
        """Be the model ``name`` from now on."""
        cut = self._cuts[name]
        self._name = name
        self._model = self._models[name]
        self._config = self._model.config
        self.lmprune_recipe_path = str(cut.recipe) if cut.recipe else None
        self.lmprune_cut = self._whole.without(cut.plan, name, Recipe.read(cut.recipe) if cut.recipe else None)

    def turns(self) -> list[Turn]:
        """The walk over all models."""
        whole = range(self._depth)
        return walk({name: cut.plan.kept if cut.plan else whole for name, cut in self._cuts.items()})

    # --- what the harness calls ---------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        key = _digest(requests, override_bs)
        if not self._memory.has(key, self._name):
            self._memory.put(key, self._score_everywhere(requests, override_bs))
        return self._memory.get(key, self._name)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._turn is None or not self.share:
            return super()._model_call(inps, *args, **kwargs)
        with _handing_on(self._layers[self._turn.name], self._turn, self._states):
            logits: torch.Tensor = super()._model_call(inps, *args, **kwargs)
        return logits

    # --- scoring ------------------------------------------------------------------------------------------------

    def _score_everywhere(self, requests: list[Any], override_bs: int | None) -> dict[str, list[Answer]]:
        """Answers of all models, batch by batch; within a batch, along the tree."""
        turns, active = self.turns(), self._name
        found: dict[str, list[Answer]] = {turn.name: [(0.0, False)] * len(requests) for turn in turns}
        if not self._proven:
            self._prove(turns, requests[0][1] + requests[0][2])
        groups = self._grouped(requests)
        size = int(override_bs or self.batch_size)
        quiet = len(groups) <= size or None  # None: a bar on a terminal only
        bar = tqdm(total=len(groups), desc=f"scoring {len(turns)} models", disable=quiet, leave=False)
        try:
            for first in range(0, len(groups), size):
                where = [i for group in groups[first : first + size] for i in group]
                part = [requests[i] for i in where]
                self._states.clear()
                for turn in turns:
                    self._turn, self._model = turn, self._models[turn.name]
                    answers = super()._loglikelihood_tokens(part, disable_tqdm=True, override_bs=override_bs)
                    for i, answer in zip(where, answers, strict=True):
                        found[turn.name][i] = answer
                bar.update(min(size, len(groups) - first))
        finally:
            bar.close()
            self._turn = None
            self._states.clear()
            self.use(active)
        return found

    def _prove(self, turns: list[Turn], tokens: list[int]) -> None:
        """Share nothing where an architecture hands more than a state from layer to layer.

        Told by one sequence, with and without sharing.
        """
        self._proven, active = True, self._name
        ids = torch.tensor([tokens[: self.max_length]], device=self.device)
        for turn in turns:
            self._model = self._models[turn.name]
            self._turn = turn
            shared = self._model_call(ids)
            self._turn = None
            if not torch.equal(shared, self._model_call(ids)):
                self.share = False
                print(
                    "lmprune: layers of this architecture hand on more than a state: nothing is shared", file=sys.stderr
                )
                break
        self._states.clear()
        self.use(active)

    def _grouped(self, requests: list[Any]) -> list[list[int]]:
        """Indices of requests that one forward pass answers, in the harness's order: longest first."""
        groups: dict[Any, list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            one_pass = tuple(context) + tuple(continuation[:-1]) if self.logits_cache else i
            groups.setdefault(one_pass, []).append(i)

        def place(group: list[int]) -> tuple[int, tuple[int, ...]]:
            # The harness runs the member with the longest continuation, the first of equals.
            _, context, continuation = max((requests[i] for i in group), key=lambda request: len(request[2]))
            return -len(context) - len(continuation), (*context, *continuation)

        return sorted(groups.values(), key=place)


@contextmanager
def _handing_on(layers: list[nn.Module], turn: Turn, states: dict[int, Any]) -> Iterator[None]:
    """Within the block, the first ``turn.start`` layers hand on the state kept for them, and states are kept."""
    for depth in [depth for depth in states if depth > turn.start]:
        del states[depth]
    with ExitStack() as undo:
        if turn.start:
            given = states[turn.start]
            for layer in layers[: turn.start]:
                undo.enter_context(_instead_of_forward(layer, given))
        for depth in turn.saves:
            handle = layers[depth - 1].register_forward_hook(
                lambda *call, depth=depth: states.update({depth: call[-1]})
            )
            undo.callback(handle.remove)
        yield


@contextmanager
def _instead_of_forward(layer: nn.Module, output: Any) -> Iterator[None]:
    """Within the block, ``layer`` computes nothing and returns ``output``; its attributes stay in sight."""
    before = layer.__dict__.get("forward")
    layer.__dict__["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del layer.__dict__["forward"]
        if before is not None:
            layer.__dict__["forward"] = before


def _digest(requests: list[Any], override_bs: int | None) -> str:
    digest = hashlib.sha256(str(override_bs).encode())
    for _, context, continuation in requests:
        digest.update(json.dumps([list(context), list(continuation)]).encode())
    return digest.hexdigest()


class _Answers:
    """Answers by request and model; in a file as well, where one is given."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._found: dict[str, Mapping[str, list[Answer]]] = {}
        if path is None or not path.is_file():
            return
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                break  # the line that an interruption cut short
            answers = {name: [(float(p), bool(best)) for p, best in pairs] for name, pairs in entry["answers"].items()}
            self._found[entry["key"]] = {**self._found.get(entry["key"], {}), **answers}

    def has(self, key: str, name: str) -> bool:
        return name in self._found.get(key, {})

    def get(self, key: str, name: str) -> list[Answer]:
        return list(self._found[key][name])

    def put(self, key: str, answers: Mapping[str, list[Answer]]) -> None:
        self._found[key] = answers
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "answers": answers}) + "\n")
