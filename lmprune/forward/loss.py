"""The loss of a model, or of many cuts of it, on tokens: cross-entropy of the next token, in nats."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from lmprune.cuts.plan import Plan
from lmprune.errors import DataError, LmpruneError, UsageError
from lmprune.forward.batches import Batch, Rows, batches_of
from lmprune.forward.journal import Journal
from lmprune.forward.kept import Kept, width_of
from lmprune.forward.machine import Halving, free_memory
from lmprune.forward.objectives import Score
from lmprune.forward.objectives.loss import CrossEntropy, token_losses
from lmprune.forward.processes import Processes
from lmprune.forward.run import run
from lmprune.forward.streaming import StreamedModel
from lmprune.forward.tree import Kinds
from lmprune.forward.views import Views
from lmprune.models.stack import find_stack
from lmprune.text.tokens import Tokens, check_known

_LOGITS_BYTES = 1 << 30
"""Room for the logits of a batch in float32, to start with."""
CHUNK = 32
"""Samples that are sorted by length among themselves: so many are looked at together, or not at all."""


Summed = tuple[NDArray[np.float64], float]
"""Of a batch: (plans, samples) nats, and layers run, in passes of a sample through the whole model."""


@dataclass(frozen=True)
class Losses:
    """The loss of each plan on each sample.

    Attributes:
        values: (plans, samples) in float64: mean nats a predicted token; 0 for a sample that predicts none.
        tokens: (samples,) predicted tokens: one less than a sample holds, or those of its answer.
        shares: (samples,) what each sample's value weighs in the mean; None: as many as its tokens.
        parts: of a mix, those by each objective, by its name.
    """

    values: NDArray[np.float64]
    tokens: NDArray[np.int64]
    shares: NDArray[np.float64] | None = None
    parts: Mapping[str, Losses] = field(default_factory=dict)

    def mean(self) -> NDArray[np.float64]:
        """(plans,) mean nats a token over all samples, each weighted by its tokens."""
        if self.shares is not None:
            mixed: NDArray[np.float64] = self.values @ self.shares
            return mixed
        means: NDArray[np.float64] = self.values @ self.tokens / self.tokens.sum()
        return means

    def errors(self, than: int = 0) -> NDArray[np.float64]:
        """(plans,) standard errors of how much more than plan ``than`` each loses, on the same samples; nan of one."""
        return standard_errors(self.values - self.values[than], self.weights)

    def own_errors(self) -> NDArray[np.float64]:
        """(plans,) standard errors of `mean`; nan of one sample."""
        return standard_errors(self.values, self.weights)

    @property
    def weights(self) -> NDArray[np.float64]:
        """(samples,) what each weighs in the mean."""
        found: NDArray[np.float64] = self.tokens / self.tokens.sum() if self.shares is None else self.shares
        return found

    @classmethod
    def mixed(cls, named: Mapping[str, Losses], shares: Sequence[float]) -> Losses:
        """The losses of the same plans by several objectives, one's samples after the other's, the mean of their means.

        Args:
            named: those by each objective.
            shares: what each objective weighs; they sum to 1.
        """
        parts = list(named.values())
        if len(parts) == 1:
            return parts[0]
        each = [share * part.tokens / part.tokens.sum() for part, share in zip(parts, shares)]
        values, tokens = ([getattr(part, name) for part in parts] for name in ("values", "tokens"))
        return cls(np.concatenate(values, 1), np.concatenate(tokens), np.concatenate(each), named)

    @classmethod
    def stacked(cls, each: Sequence[Losses]) -> Losses:
        """Those of several tables on the same samples, as one."""
        first = each[0]
        parts = {name: cls.stacked([losses.parts[name] for losses in each]) for name in first.parts}
        return cls(np.concatenate([losses.values for losses in each]), first.tokens, first.shares, parts)


def standard_errors(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """(rows,) standard errors of weighted means of ``values`` (rows, samples): by how far samples are from them.

    Args:
        weights: (samples,) which sum to 1.
    """
    count = len(weights)
    squares = (values - (values @ weights)[:, None]) ** 2
    found: NDArray[np.float64] = np.sqrt(squares @ weights**2 * (count / (count - 1) if count > 1 else np.nan))
    return found


class LossTable:
    """The losses of plans of one model by one objective, sample by sample: measured when asked for, and kept.

    Layers that plans have in common from the first on are computed once where that changes no number. The model is left
    as it was.

    Args:
        model: live; or one that is read layer by layer, once for all plans that are asked for together.
        score: how logits are scored; cross-entropy where it is None.
        batch_size: samples in one forward pass; chosen by the device, and halved when memory runs out.
        share: whether layers in common are computed once; without, every plan is a pass of its own.
        progress: show a bar on a terminal.
        journal: where values are kept as they come, batch by batch, under ``name``.
        states: of a batch, how many are kept at once for layers in common; what is not kept is computed again.
        abreast: how many plans run in one pass at most, as one larger batch: the same but for rounding.
        processes: that share the batches; all of them ask for the same in the same order, and know all values.
        keep: whether states stay for what is asked for later, as much as memory has room for.
        runs: gives the model whose plans are measured, where it is a repaired cut and not ``model`` itself; asked once
            there is something to measure.

    Attributes:
        counts: (samples,) predicted tokens.
        passes: layers computed so far, in passes of a sample through the whole model.

    Raises:
        DataError: no sample has a token to predict.
    """

    def __init__(
        self,
        model: Any,
        tokens: Tokens,
        score: Score | None = None,
        *,
        batch_size: int | None = None,
        share: bool = True,
        progress: bool = True,
        journal: Journal | None = None,
        name: str = "loss",
        states: int | None = None,
        runs: Callable[[], Any] | None = None,
        keep: bool = False,
        abreast: int = 1,
        processes: Processes | None = None,
    ) -> None:
        self._processes = processes or Processes()
        self.counts = tokens.predicted
        if not self.counts.any():
            raise DataError(f"{tokens.source}: every sample is one token long, which leaves none to predict. Give more")
        self._whole, self._runs = model, runs or (lambda: model)
        self._score = score or CrossEntropy(tokens)
        check_known(tokens.rows, model.config.get_text_config().vocab_size, tokens.source)
        self._rows: Rows = [np.asarray(row, dtype=np.int32) for row in tokens.rows]
        size = batch_size or usual_batch(model, max(map(len, self._rows)))
        self._batches = batches_of([len(row) for row in self._rows], size, CHUNK)
        self._share, self._progress, self._states = share, progress, states
        self._journal, self._name = journal if journal is not None else Journal(None, {}), name
        self._kinds: Kinds = {}
        self._held = self._keeping() if keep and share and not isinstance(model, StreamedModel) else None
        self._known: dict[Plan, NDArray[np.float64]] = {}
        self._views: Views | None = None
        self._proven: set[int] = set()
        self._abreast, self._abreast_proven = abreast, False
        self.passes = 0.0

    @property
    def samples(self) -> int:
        """How many there are."""
        return len(self._rows)

    def losses(self, plans: Sequence[Plan], samples: int | None = None) -> Losses:
        """Of each of ``plans``; ``Plan(L)`` is the whole model.

        Args:
            samples: only the first so many, and those that share a `CHUNK` with them.

        Raises:
            ModelError: a plan cannot be carried out, or memory runs out even for one sample.
        """
        stop = min(self.samples, math.ceil((samples or self.samples) / CHUNK) * CHUNK)
        batches = [batch for batch in self._batches if batch[0] < stop]
        lacking = [plan for plan in dict.fromkeys(plans) if self._lacks(plan, stop)]
        if lacking:
            self._measure(lacking, batches)
        sums, counts = np.zeros((len(plans), stop)), self.counts[:stop]
        for place, plan in enumerate(plans):
            sums[place] = self._known[plan][:stop]
        return Losses(np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0), counts)

    def _lacks(self, plan: Plan, stop: int) -> bool:
        return plan not in self._known or bool(np.isnan(self._known[plan][:stop]).any())

    def _keeping(self) -> Kept:
        lengths, config = [len(row) for row in self._rows], self._whole.config.get_text_config()
        device = self._whole.device
        return Kept(
            self._batches,
            lengths,
            width_of(config) * self._whole.dtype.itemsize,
            most=self._states,
            free=lambda: free_memory(device),
        )

    def _measure(self, plans: Sequence[Plan], batches: Sequence[Sequence[int]]) -> None:
        """Run ``plans`` over the batches that some of them have not seen."""
        whole_layers = [plan for plan in plans if not plan.parts]
        if self._abreast > 1 and 0 < len(whole_layers) < len(plans):  # which run at once, and the others one by one
            self._measure(whole_layers, batches)
            plans = [plan for plan in plans if plan.parts]
        for plan in plans:
            self._known.setdefault(plan, np.full(self.samples, np.nan))
        lack = [batch for batch in batches if any(np.isnan(self._known[plan][batch[0]]) for plan in plans)]
        named = {spelled(plan): plan for plan in plans}
        lack = [batch for batch in lack if not self._kept(named, batch)]
        if not lack:
            return
        if isinstance(self._whole, StreamedModel):
            return self._stream(self._whole, named, lack)
        if self._held is not None:
            self._held.fit()
        total, shown = len(plans) * sum(map(len, lack)), self._progress and self._processes.main
        with tqdm(total=total, unit=" losses", disable=None if shown else True, leave=False) as bar:
            for views in self._views_of(plans).parts():
                views.believe(self._proven)
                views.abreast, views.abreast_proven = self._abreast, self._abreast_proven
                left = [batch for batch in lack if not self._kept(views.plans, batch)]
                bar.update(len(views.plans) * sum(len(batch) for batch in lack if batch not in left))
                for first in range(0, len(left), self._processes.size):
                    group = left[first : first + self._processes.size]
                    self._measured(views, group)
                    bar.update(len(views.plans) * sum(map(len, group)))
                if views.share:
                    self._proven |= views.starts
                self._abreast, self._abreast_proven = views.abreast, views.abreast_proven

    def _stream(self, model: StreamedModel, named: Mapping[str, Plan], lack: Sequence[Sequence[int]]) -> None:
        """Read the model once for as many batches as there is room for, and for all plans."""
        every, lack = lack, lack[self._processes.rank :: self._processes.size]
        learns = self._score.whole and not all(self._score.knows(sample) for batch in lack for sample in batch)
        plans = [*([Plan(model.layers)] if learns else []), *named.values()]
        check_whole_layers(plans)
        batches = [Batch.of([self._rows[sample] for sample in batch], model.device) for batch in lack]
        size, found = model.at_once(batches, len(plans)) if batches else 1, np.zeros(0)
        mine: list[Summed] = []

        def take(at: int, cuts: list[int], output: Any) -> None:
            samples, ran = lack[first + at], batches[first + at]
            if learns and 0 in cuts:
                self._score.learn(samples, ran, output.logits)
            found[cuts, at, : len(samples)] = self._score(samples, ran, output.logits)

        for first in range(0, len(lack), size):
            part = batches[first : first + size]
            found = np.zeros((len(plans), len(part), max(map(len, lack))))
            took = model.logits(part, plans, take) / model.layers / len(part)
            asked = found[len(plans) - len(named) :]
            mine += [(asked[:, at, : len(samples)], took) for at, samples in enumerate(lack[first : first + size])]
        self._take(named, every, mine)

    def _views_of(self, plans: Sequence[Plan]) -> Views:
        """Of the plans, from those of the call before where it had the same."""
        names = {plan: spelled(plan) for plan in plans}
        if self._views is not None and set(names.values()) <= set(self._views.plans):
            return self._views.only(list(names.values()))
        self._views = Views(
            self._runs(),
            {name: plan for plan, name in names.items()},
            share=self._share,
            most=self._states,
            kept=self._held,
            kinds=self._kinds,
        )
        return self._views

    def _measured(self, views: Views, group: Sequence[Sequence[int]]) -> None:
        """Measure batches, one in each process."""
        mine = [self._summed(views, batch) for batch in group[self._processes.rank : self._processes.rank + 1]]
        self._take(views.plans, group, mine)

    def _take(self, plans: Mapping[str, Plan], group: Sequence[Sequence[int]], mine: Sequence[Summed]) -> None:
        """Note what all processes have summed of the batches of ``group``, which they take in turns."""
        every = self._processes.gather(list(mine))
        for place, batch in enumerate(group):
            found, passes = every[place % len(every)][place // len(every)]
            self._journal.put(self._key(plans, batch), found)
            self._kept(plans, batch)
            self.passes += passes

    def _kept(self, plans: Mapping[str, Plan], batch: Sequence[int]) -> bool:
        """Take what the journal has of these plans together; whether it has."""
        key = self._key(plans, batch)
        if self._journal.has(key):
            for plan, found in zip(plans.values(), self._journal.get(key)):
                self._known[plan][list(batch)] = found
        return self._journal.has(key)

    def _key(self, plans: Mapping[str, Plan], batch: Sequence[int]) -> str:
        asked = hashlib.sha256("|".join(plans).encode()).hexdigest()[:16]
        return f"{self._name} {asked} {batch[0]}-{len(batch)}"

    def _summed(self, views: Views, batch: Sequence[int]) -> Summed:
        """(views, samples) nats summed over each sample's tokens, and what that took."""
        took = 0.0
        found, place = np.zeros((len(views.plans), len(batch))), {sample: i for i, sample in enumerate(batch)}
        number = {name: i for i, name in enumerate(views.plans)}
        say = logging.getLogger("lmprune").info
        if self._score.whole and not all(map(self._score.knows, batch)):

            def learn(name: str, samples: Sequence[int], ran: Batch, output: Any) -> None:
                self._score.learn(samples, ran, output.logits)

            whole = Views(self._whole, {"whole": Plan(len(find_stack(self._whole).layers))})
            run(whole, self._rows, [batch], learn, say=say)
            took += len(batch)

        def collect(name: str, samples: Sequence[int], ran: Batch, output: Any) -> None:
            found[number[name], [place[sample] for sample in samples]] = self._score(samples, ran, output.logits)

        ran = run(views, self._rows, [batch], collect, say=say)
        return found, took + ran / next(iter(views.plans.values())).layers


def check_whole_layers(plans: Sequence[Plan]) -> None:
    """Refuse what is not cut from a model that is read layer by layer.

    Raises:
        UsageError: a plan cuts more than whole layers.
    """
    if any(plan.parts for plan in plans):
        raise UsageError("a model that is read layer by layer loses whole layers only. Use --criterion greedy")


def spelled(plan: Plan) -> str:
    """A name of a plan, the same in every process."""
    return " ".join([str(plan.layers), *map(str, plan.dropped), *map(repr, plan.parts)])


def losses(
    model: Any,
    plans: Sequence[Plan],
    tokens: Tokens,
    *,
    batch_size: int | None = None,
    share: bool = True,
    progress: bool = True,
) -> Losses:
    """The loss of each of ``plans`` of the live ``model`` on ``tokens``; arguments and errors as of `LossTable`."""
    return LossTable(model, tokens, batch_size=batch_size, share=share, progress=progress).losses(plans)


def usual_batch(model: Any, length: int) -> int:
    """Samples in a forward pass to start with."""
    usual = 8 if model.device.type == "cpu" else 32
    vocabulary = model.config.get_text_config().vocab_size
    return max(1, min(usual, _LOGITS_BYTES // (4 * length * vocabulary)))


def targets(ids: Tensor, unscored: int | None) -> Tensor:
    """``ids`` as what should be predicted: -100, which torch's losses skip, in the place of ``unscored``."""
    return ids if unscored is None else ids.masked_fill(ids == unscored, -100)


def held_out_loss(model: Any, blocks: NDArray[np.int32], **how: Any) -> float:
    """The mean of `held_out_losses`, which takes the same."""
    return float(held_out_losses(model, blocks, **how).mean()[0])


@torch.no_grad()
def held_out_losses(
    model: Any,
    blocks: NDArray[np.int32],
    *,
    batch: int,
    unscored: int | None = None,
    places: Callable[[NDArray[np.int32]], NDArray[np.int64]] | None = None,
) -> Losses:
    """The loss of each of several blocks of real tokens (blocks, length); ``batch`` halves when memory runs out.

    The token ``unscored`` is never asked for. ``places`` gives the tokens of a block their places in their documents,
    which are then kept apart.

    Raises:
        LmpruneError: it is no number, or memory is short even for one block.
    """

    def work(part: list[NDArray[np.int32]]) -> NDArray[np.float64]:
        ids = torch.from_numpy(np.stack(part).astype(np.int64)).to(model.device)
        more = {} if places is None else {"position_ids": torch.from_numpy(np.stack(list(map(places, part)))).to(ids)}
        logits = model(input_ids=ids, use_cache=False, **more).logits[:, :-1]
        found: NDArray[np.float64] = block_sums(logits, targets(ids[:, 1:], unscored))
        return found

    def hopeless(block: NDArray[np.int32]) -> LmpruneError:
        return LmpruneError(f"out of memory with one held-out block of {len(block)} tokens. Use a smaller --max-length")

    halving = Halving(work, hopeless)
    sums: list[NDArray[np.float64]] = []
    # Where memory is not refused but taken until the system kills the process, nothing is halved.
    if (config := getattr(model, "config", None)) is not None:
        numbers = blocks.shape[1] * config.get_text_config().vocab_size
        room = min(_LOGITS_BYTES, free_memory(model.device) // 4)
        batch = max(1, min(batch, room // (4 * numbers)))
    for at in range(0, len(blocks), batch):
        sums += halving(list(blocks[at : at + batch]))
    return of_sums(np.concatenate(sums), blocks, unscored)


def block_sums(logits: Tensor, wanted: Tensor) -> NDArray[np.float64]:
    """(blocks,) summed losses of ``logits`` (blocks, length, vocabulary) for ``wanted``."""
    found: NDArray[np.float64] = token_losses(logits, wanted).cpu().double().sum(1).numpy()
    return found


def of_sums(sums: NDArray[np.float64], blocks: NDArray[np.int32], unscored: int | None) -> Losses:
    """The losses of one model, of which the sums (blocks,) over the counted tokens of ``blocks`` are known.

    Raises:
        LmpruneError: they are no numbers.
    """
    asked = blocks[:, 1:] != unscored if unscored is not None else np.ones_like(blocks[:, 1:], dtype=bool)
    tokens = asked.sum(1).astype(np.int64)
    if not tokens.any():
        tokens = np.ones_like(tokens)
    found = Losses((sums / np.maximum(1, tokens))[None], tokens)
    if not math.isfinite(loss := float(found.mean()[0])):
        raise LmpruneError(f"the held-out loss is {loss}: the model is broken. Verify it with `lmprune verify`")
    return found
