"""One load of a base model, many pruned models of it, and one pass over what they have in common.

Everything but the sharing is the harness's: `_loglikelihood_tokens` and `generate_until` run unmodified for each model,
on the very batches that a separate run would make, so that the numbers are the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe
from lmprune.evaluation.plugin import LmpruneLM
from lmprune.forward.journal import Journal
from lmprune.forward.views import Views
from lmprune.models.stack import find_stack
from lmprune.versions import versions

Answer = tuple[float, bool]
"""Log-probability of a continuation, and whether it is the likeliest."""


@dataclass(frozen=True)
class SharedCut:
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
        journal: a file that keeps answers over an interruption; `close` lets others have it.
        share: whether layers in common are computed once.

    Attributes:
        views: the models as the harness sees them; `share` among them says whether sharing was found to be exact.

    Raises:
        OutputError: another run has the journal open.
    """

    def __init__(
        self, pretrained: str, cuts: list[SharedCut], *, journal: Path | None = None, share: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(pretrained, **kwargs)
        if self.batch_size == "auto":
            self.batch_size_per_gpu: Any = self._detect_batch_size()
        self._whole = self.lmprune_cut
        self._recipes = {cut.name: cut.recipe for cut in cuts}
        read = {cut.name: Recipe.read(cut.recipe) if cut.recipe else None for cut in cuts}
        self._cuts = {cut.name: self._whole.without(cut.plan, cut.name, read[cut.name]) for cut in cuts}
        layers = len(find_stack(self._model).layers)
        self._plans = {cut.name: cut.plan or Plan(layers) for cut in cuts}
        self._journal = Journal(journal, self._identity() if journal is not None else {})
        self.views = Views(self._model, self._plans, share=share)
        self.use(cuts[0].name)

    def use(self, name: str) -> None:
        """Be the model ``name`` from now on."""
        self._name = name
        self._model = self.views.view(name)
        self._config = self._model.config
        self.lmprune_recipe_path = str(self._recipes[name]) if self._recipes[name] else None
        self.lmprune_cut = self._cuts[name]

    def close(self) -> None:
        """Let others have the journal."""
        self._journal.close()

    def _identity(self) -> dict[str, Any]:
        """All that answers depend on besides the requests and the plan."""
        model = self._model
        return {
            "fingerprint": self._whole.fingerprint,
            "dtype": str(model.dtype),
            "quantised": str(getattr(model.config, "quantization_config", None) or ""),
            "device": torch.device(self.device).type,
            "lmprune": versions().get("lmprune"),
        }

    # --- what the harness calls ---------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        asked = _digest(requests, override_bs)
        if not self._journal.has(self._key(asked, self._name)):
            for name, answers in self._score_everywhere(requests, override_bs).items():
                self._journal.put(self._key(asked, name), answers)
        return [(float(p), bool(best)) for p, best in self._journal.get(self._key(asked, self._name))]

    def _key(self, asked: str, name: str) -> str:
        """Of answers: by the plan and not by the name, which another run may give to another plan."""
        plan = self._plans[name]
        return f"{asked} {plan.dropped}" + "".join(f" {part}" for part in plan.parts)

    # --- scoring ------------------------------------------------------------------------------------------------

    def _score_everywhere(self, requests: list[Any], override_bs: int | None) -> dict[str, list[Answer]]:
        """Answers of all models, batch by batch; within a batch, along the tree."""
        views, active = self.views, self._name
        found: dict[str, list[Answer]] = {name: [(0.0, False)] * len(requests) for name in self._plans}
        self._prove(requests[0][1] + requests[0][2])
        groups = self._grouped(requests)
        size = int(override_bs or self.batch_size)
        quiet = len(groups) <= size or None  # None: a bar on a terminal only
        bar = tqdm(total=len(groups), desc=f"scoring {len(found)} models", disable=quiet, leave=False)
        try:
            for first in range(0, len(groups), size):
                where = [i for group in groups[first : first + size] for i in group]
                part = [requests[i] for i in where]
                views.begin()
                for turn in views.turns:
                    with views.turn(turn) as self._model:
                        answers = super()._loglikelihood_tokens(part, disable_tqdm=True, override_bs=override_bs)
                    for i, answer in zip(where, answers, strict=True):
                        found[turn.name][i] = answer
                bar.update(min(size, len(groups) - first))
        finally:
            bar.close()
            views.begin()
            self.use(active)
        return found

    def _prove(self, tokens: Iterable[int]) -> None:
        """Share nothing where an architecture hands more than a state from layer to layer."""
        ids = torch.tensor([list(tokens)[: self.max_length]], device=self.device)

        def call(view: Any) -> torch.Tensor:
            self._model = view
            logits: torch.Tensor = self._model_call(ids)
            return logits

        if self.views.share and not self.views.prove(call):
            logging.getLogger("lmprune").info(
                "layers of this architecture hand on more than a state: nothing is shared"
            )

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


def _digest(requests: list[Any], override_bs: int | None) -> str:
    digest = hashlib.sha256(str(override_bs).encode())
    for _, context, continuation in requests:
        digest.update(json.dumps([list(context), list(continuation)]).encode())
    return digest.hexdigest()
