"""What shapes of a live model cost and take: orders and directions once, then a repaired student for each trial."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lmprune.benching.measuring import times_as_fast
from lmprune.benching.settings import LEAST_RUNS
from lmprune.budgeting.budget import AXES, Budget, Shape
from lmprune.choosing.evidence import ModelEvidence
from lmprune.choosing.repairing import blocks_of
from lmprune.cuts.plan import Plan
from lmprune.errors import ModelError, UsageError, sized
from lmprune.forward.batches import Batch, batches_of
from lmprune.forward.views import pruned_view
from lmprune.healing.methods.refit import Refit
from lmprune.healing.refitting import refit
from lmprune.models.fields import decoder_fields
from lmprune.models.in_files import copied
from lmprune.models.loading import empty_model
from lmprune.models.mlps import mlps, narrowed
from lmprune.models.stack import find_stack
from lmprune.models.width import Slicing, check_slicing, live_source, width_of
from lmprune.narrowing import WIDTHS, Order, Rotation
from lmprune.narrowing.orders import Neurons, check_neurons, directions, group_orders, neuron_orders

GATE = 0.95
"""A smaller hidden size is worth a trial where its directions hold this share of the stream's energy (PCA)."""
RIDGES = "1e-4,1e-3,1e-2"
"""That a trial's repair chooses from."""
_LENGTH, _BLOCKS = 256, 8
"""Tokens in a block that is fitted on, unless so many blocks would be more than there is."""
_BATCH_TOKENS = 2048
_CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
"""Config fields that say how many experts a token goes to."""
_GLANCE = 3
"""Runs that tell a speed which nothing depends on."""
_say = logging.getLogger("lmprune").info


class Trial(NamedTuple):
    """What a shape costs once it is repaired: the loss on the text that is chosen on, and on unseen text.

    ``passes`` is what the repair took, in passes of the whole model over the text that is chosen on.
    """

    chosen: float
    judged: float
    passes: float


class ModelLab:
    """`lmprune.budgeting.search.Lab` of a live model.

    Args:
        evidence: of the whole model, in float32.
        budget: what `amount` is of.
        neurons: the method that orders neurons, of `WIDTHS`.
        fit_tokens: that orders, directions and repairs are fitted on.

    Attributes:
        notes: what the user should be told.
        tried: the shapes whose cost was asked for, those of a search that was killed too.
    """

    def __init__(self, evidence: ModelEvidence, budget: Budget, *, neurons: str, fit_tokens: int) -> None:
        self._evidence, self._budget, self._neurons = evidence, budget, WIDTHS.find(neurons)
        self._name, self._fit_tokens = neurons, fit_tokens
        if self._neurons.AXIS != "ffn":
            raise UsageError(f"--neurons {neurons}: it orders {self._neurons.AXIS}. Choose one that orders neurons")
        if budget.what == "speed" and evidence.in_files:
            raise UsageError(
                "--speed: the weights wait in files, so that only the disk's speed could be measured. Leave --stream "
                "out, or give --params or --size"
            )
        self._model: Any = evidence.model
        self._source = live_source(self._model)
        self._amounts: dict[Shape, float] = {}
        self._speeds: dict[tuple[int, int, int, int], float] = {}
        self._sizes: dict[tuple[int, int, int, int], tuple[int, int]] = {}
        self._ranked: dict[tuple[int, ...], list[int]] = {}
        self.notes: list[str] = []
        self.tried: dict[Shape, Trial] = {}

    # --- the model ------------------------------------------------------------------------------------------------

    @property
    def whole(self) -> Shape:
        """The whole model."""
        return self._whole

    @cached_property
    def _whole(self) -> Shape:
        inner = decoder_fields(self._source.config)
        groups, hidden = inner.get("num_key_value_heads"), inner.get("hidden_size")
        return Shape(
            (), self._ffn(), hidden if isinstance(hidden, int) else 0, groups if isinstance(groups, int) else 0
        )

    @property
    def depth(self) -> int:
        """See `Lab`."""
        return self._evidence.layers

    @property
    def heads(self) -> int:
        """See `Lab`."""
        return int(decoder_fields(self._source.config).get("num_attention_heads") or 1)

    def _ffn(self) -> int:
        try:
            return min(mlp.neurons for mlp in narrowed(self._source) if not mlp.shared)
        except ModelError:
            return 0

    @property
    def has_experts(self) -> bool:
        """Whether some of its MLPs are experts."""
        return any(mlp.experts is not None for mlp in mlps(self._source))

    @property
    def _routed(self) -> float:
        """The share of the tokens that an expert sees on average."""
        counts = [mlp.experts for mlp in mlps(self._source) if mlp.experts is not None]
        inner = decoder_fields(self._source.config)
        chosen = next((inner[name] for name in _CHOSEN if isinstance(inner.get(name), int)), None)
        return min(1.0, chosen / max(counts)) if counts and chosen else 1.0

    def require(self, kind: str) -> None:
        """Refuse a kind that this model does not allow.

        Raises:
            ModelError: with the reason.
        """
        if kind == "ffn":
            check_neurons(self._model, Batch.of([self._rows[0][:16]], next(self._model.parameters()).device))
        elif kind == "slice":
            check_slicing(self._source.config)
            _ = Slicing(torch.empty(0), self._source).stream
        elif kind == "groups":
            plan = self._plan(self.whole.to("groups", 1), {f"groups.{n}": torch.zeros(1, dtype=torch.int32) for n in
                                                          range(self._evidence.layers)})  # fmt: skip
            pruned_view(self._model, plan)

    def _plan(self, shape: Shape, tensors: Mapping[str, Tensor]) -> Plan:
        changed = {axis: getattr(shape, axis) for axis in AXES.values()}
        changed = {axis: size for axis, size in changed.items() if size != getattr(self.whole, axis)}
        parts = (width_of(tensors, **changed),) if changed else ()
        return Plan(self._evidence.layers, shape.dropped, parts)

    def plan(self, shape: Shape) -> Plan:
        """The plan of a shape, with the file of what stays."""
        tensors: dict[str, Tensor] = {}
        kept = [layer for layer in range(self._evidence.layers) if layer not in shape.dropped]
        if shape.ffn != self.whole.ffn:
            share = Fraction(shape.ffn, self.whole.ffn)
            tensors |= {each.name: each.kept(share) for each in self._orders if each.layer in kept}
        if shape.groups != self.whole.groups:
            for layer in kept:
                tensors[f"groups.{layer}"] = self._groups[layer].kept(shape.groups).to(torch.int32)
        if shape.hidden != self.whole.hidden:
            tensors["rotation"] = self._rotation.directions[:, : shape.hidden].float()
        return self._plan(shape, tensors)

    # --- what stays -----------------------------------------------------------------------------------------------

    @cached_property
    def _rows(self) -> list[NDArray[np.int32]]:
        """Blocks to fit on."""
        few = min(self._evidence.rest.count, self._fit_tokens) // _BLOCKS
        length, blocks = blocks_of(self._evidence.rest, self._evidence.cut, max(2, min(_LENGTH, few)))
        rows = [np.asarray(block, np.int32) for block in islice(blocks, max(2, -(-self._fit_tokens // length)))]
        tokens = sum(map(len, rows))
        wanted = round(self.whole.ffn / self._routed)
        if tokens < wanted:
            each = " of each expert" if self.has_experts else ""
            self.notes.append(
                f"{tokens:,} tokens to fit on for {self.whole.ffn:,} neurons{each}: the ridge carries it; "
                f"{4 * wanted:,} would do"
            )
        return rows

    @cached_property
    def _batches(self) -> list[Batch]:
        size = max(1, _BATCH_TOKENS // max(map(len, self._rows)))
        device = next(self._model.parameters()).device
        numbers = batches_of([len(row) for row in self._rows], size)
        return [Batch.of([self._rows[number] for number in part], device) for part in numbers]

    @cached_property
    def _orders(self) -> list[Neurons]:
        _say(f"neurons: by {self._name}, layer by layer")
        return list(neuron_orders(self._model, self._batches, self._neurons))

    @cached_property
    def _groups(self) -> list[Order]:
        return list(group_orders(self._model, self._batches, WIDTHS["groups"], self.whole.groups))

    @cached_property
    def _rotation(self) -> Rotation:
        return directions(self._model, self._batches)

    # --- what the search asks -------------------------------------------------------------------------------------

    def amount(self, shape: Shape) -> float:
        """See `Lab`."""
        if self._budget.what == "speed":
            return 1 / self.speed(shape)
        inner, every = self.parameters(shape)
        return float(inner if self._budget.what == "params" else every * self.bytes)

    @cached_property
    def bytes(self) -> int:
        """Of one number, as the model is stored."""
        return self._evidence.cut.dtype().itemsize

    def limit(self) -> float:
        """The budget in the terms of `amount`.

        A share is one of the layers: three quarters of twelve are nine, whatever the last norm adds.

        Raises:
            UsageError: the embeddings alone take more, or the whole model takes no more.
        """
        if self._budget.what == "params":
            layers = sum(parameter.numel() for parameter in find_stack(self._model).layers.parameters())
            return float(round(self._budget.value * layers) + self.parameters(self.whole)[0] - layers)
        if self._budget.what == "speed":
            return 1 / self._budget.value
        inner, every = self.parameters(self.whole)
        said = f"--size {sized(self._budget.value)}"
        if (every - inner) * self.bytes >= self._budget.value:
            alone = sized((every - inner) * self.bytes)
            raise UsageError(f"{said}: the embeddings alone take {alone}. Allow more")
        if every * self.bytes <= self._budget.value:
            raise UsageError(f"{said}: the whole model takes {sized(every * self.bytes)} already. Ask for less")
        return self._budget.value

    def parameters(self, shape: Shape) -> tuple[int, int]:
        """Parameters without embeddings and head, and all of them, shared ones once."""
        key = _counts(shape)
        if key not in self._sizes:
            model = empty_model(self._config(shape))
            ends = {id(end.weight): end.weight.numel() for end in (model.get_input_embeddings(),
                    model.get_output_embeddings()) if end is not None}  # fmt: skip
            every = sum(parameter.numel() for parameter in model.parameters())
            self._sizes[key] = every - sum(ends.values()), every
        return self._sizes[key]

    def _config(self, shape: Shape) -> Any:
        """The config of any model of so many layers and these sizes."""
        size = (1, 1) if self.has_experts else (1,)  # by which experts are known
        names = {f"neurons.{n}": torch.zeros(size, dtype=torch.int32) for n in range(self._evidence.layers)}
        plan = self._plan(shape, names)
        return self._evidence.cut.without(plan, "a shape").live_config

    @property
    def has_speed(self) -> bool:
        """Whether a speed can be measured: that of a model whose weights wait in files is the disk's."""
        return not self._evidence.in_files

    def speed(self, shape: Shape) -> float:
        """Times as fast as the whole model, measured here on the live ones in turns; kept by the counts alone."""
        key = _counts(shape)
        if key not in self._speeds:
            name = f"speed {self._budget.value:g} {key}"
            journal = self._evidence.journal
            if not journal.has(name):
                student = pruned_view(self._model, self.plan(shape)).eval()
                runs = LEAST_RUNS if self._budget.what == "speed" else _GLANCE
                journal.put(name, times_as_fast(student, self._model, runs=runs) if shape != self.whole else 1.0)
            self._speeds[key] = float(journal.get(name))
        return self._speeds[key]

    def cost(self, shape: Shape) -> float:
        """See `Lab`."""
        return self.trial(shape).chosen

    def trial(self, shape: Shape) -> Trial:
        """What a shape costs repaired, measured where it is not known."""
        name = f"trial {self._evidence.objective} {self._name} {self._fit_tokens} in blocks {shape}"
        if not self._evidence.journal.has(name):
            self._evidence.journal.put(name, list(self._tried(shape)))
        self.tried[shape] = Trial(*self._evidence.journal.get(name))
        return self.tried[shape]

    @property
    def passes(self) -> float:
        """What losses and repairs took, in passes of the whole model over the text that is chosen on."""
        return self._evidence.passes + sum(trial.passes for trial in self.tried.values())

    def as_cut(self, shape: Shape) -> float:
        """Its loss on unseen text as it is cut, without repair."""
        plan = self.plan(shape)
        return self._evidence.of_changed(plan, lambda: pruned_view(self._model, plan).eval(), self._name)[1]

    def _tried(self, shape: Shape) -> Trial:
        plan = self.plan(shape)
        if shape == self.whole:
            return Trial(*self._evidence.of_changed(plan, lambda: self._model, "as it is"), 0.0)
        student = own_tensors(pruned_view(self._model, plan), self._model).eval()
        report = refit(student, self._model, plan, self._rows, Refit(ridges=RIDGES, last_for="states"))
        self.notes += [note for note in report.notes if note not in self.notes]
        passes = report.passes * report.tokens / self._evidence.text.count
        return Trial(
            *self._evidence.of_changed(plan, lambda: student, f"refitted on {self._fit_tokens} in blocks"), passes
        )

    def layers(self, shape: Shape) -> Sequence[int]:
        """See `Lab`; by the loss of the whole width without them."""
        if shape.dropped not in self._ranked:
            free = [n for n in range(self._evidence.layers) if n not in {*shape.dropped, *self._evidence.protected}]
            if len(free) + len(self._evidence.protected - set(shape.dropped)) < 2:
                free = []
            plans = [Plan(self._evidence.layers, (*shape.dropped, layer)) for layer in free]
            costs = self._evidence.ranked(plans) if plans else np.zeros(0)
            self._ranked[shape.dropped] = [free[int(place)] for place in costs.argsort(kind="stable")]
        return self._ranked[shape.dropped]

    def allows(self, shape: Shape) -> bool:
        """See `Lab`."""
        return shape.hidden == self.whole.hidden or self._rotation.kept(shape.hidden) >= GATE


def _counts(shape: Shape) -> tuple[int, int, int, int]:
    return len(shape.dropped), shape.ffn, shape.hidden, shape.groups


def own_tensors(view: Any, whole: Any) -> Any:
    """``view`` with parameters of its own in its layers, where they are those of ``whole``: a refit does not reach it.

    Embeddings and head, which it leaves as they are, stay those of the whole model; where a smaller hidden size changes
    them, a view has its own already.
    """
    theirs = {id(parameter) for parameter in whole.parameters()}
    made: dict[int, nn.Parameter] = {}
    for module in find_stack(view).layers.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in theirs:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(copied(view, parameter.detach()), requires_grad=False)
                module._parameters[name] = made[id(parameter)]
    return view
