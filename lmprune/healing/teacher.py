"""The unpruned model inside the pruned one: the same modules with the dropped layers put back and adapters off.

Every frozen weight is there once. Only what the student trains directly (not through an adapter) has a frozen twin,
and below the first layer where the two models can differ their hidden states are computed once. Where the pruned
model's layers are no longer the base's own, the two stand apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from lmprune.cuts.plan import Plan, runs
from lmprune.forward.calls import entering, given, leaving
from lmprune.models.fields import apply_fields, changed_fields
from lmprune.models.stack import Stack, drop_layers, find_stack


class Terms(Protocol):
    """The weights of the terms of `Teacher.loss`, and how likely tokens are told; `methods.distill` has them."""

    @property
    def kl(self) -> float: ...
    @property
    def hard(self) -> float: ...
    @property
    def aux(self) -> float: ...
    @property
    def states(self) -> float: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...


@dataclass
class Arrangement:
    """A choice of the base's layers to run, and the config fields that go with it."""

    layers: nn.ModuleList
    fields: list[tuple[Any, str, Any]]
    """(config object, attribute, value)."""


@dataclass
class Lesson:
    """What one batch teaches.

    Attributes:
        log_rest: log of all probability outside ``tokens``, (batch, length-1); None where every token is kept.
        tokens: ids of the teacher's likeliest tokens, (batch, length-1, k).
        log_p: their log-probabilities at the wanted temperature.
        states: hidden state entering each of the base's layers that is compared, (batch, length, hidden), by its
            number; by the number of layers what leaves the last.
        shared: hidden state entering the first layer that can differ, or None if none is shared.
    """

    tokens: Tensor | None
    log_p: Tensor
    log_rest: Tensor | None
    states: dict[int, Tensor]
    shared: Tensor | None


@dataclass
class Teacher:
    """Built from the whole base model, which it turns into the student. Call `freeze_twins` once the student trains."""

    model: Any
    settings: Terms
    plan: Plan
    stack: Stack
    everything: list[nn.Module]
    base_configs: list[tuple[Any, dict[str, Any]]]
    adapter: bool = False
    """Whether the student learns in an adapter, which is off while the teacher speaks."""
    twins: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    shared_layers: int = 0
    """How many of the base's first layers teacher and student run as one."""

    @classmethod
    def take_apart(cls, model: nn.Module, plan: Plan, settings: Terms) -> Teacher:
        """Drop the layers of ``plan`` from ``model``, in place, and keep them for the teacher."""
        stack = find_stack(model)
        everything = list(stack.layers)
        configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
        base_configs = [(config, config.to_dict()) for config in configs]
        for layer in plan.dropped:
            everything[layer].requires_grad_(False)
        drop_layers(model, plan)
        return cls(model, settings, plan, stack, everything, base_configs)

    def freeze_twins(self, student: Any, *, adapter: bool) -> None:
        """Remember weights that are about to train, and find out how much is shared."""
        self.model, self.adapter = student, adapter
        trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self.twins = [] if adapter else [(p, p.detach().clone()) for p in trained.values()]
        # Full training makes states in float32, which a LayerNorm of the CPU takes with weights of float32 alone.
        for norm in (part for layer in self.plan.dropped for part in self.everything[layer].modules()):
            if isinstance(norm, nn.LayerNorm):
                norm.float()
        first = len(self.everything)
        for layer in self.plan.kept:
            if any(p.requires_grad for p in self.everything[layer].parameters()):
                first = layer
                break
        inputs = student.get_input_embeddings()
        first = 0 if any(p.requires_grad for p in inputs.parameters()) else first
        self.shared_layers = min(first, self.plan.dropped[0])
        # One layer must be left to receive the shared state, even where nothing but the head trains.
        self.shared_layers = min(self.shared_layers, self.plan.kept[-1])
        self._whole = self._arrange(tuple(range(self.plan.layers)))
        self._student = self._arrange(tuple(i for i in self.plan.kept if i >= self.shared_layers))

    def _arrange(self, layers: tuple[int, ...]) -> Arrangement:
        settings: list[tuple[Any, str, Any]] = []
        for config, base in self.base_configs:
            touched = changed_fields(base, self.plan.kept).keys() | changed_fields(base, layers).keys()
            wanted = apply_fields(base, changed_fields(base, layers))
            for dotted in touched:
                target, values = config, wanted
                *parents, name = dotted.split(".")
                for parent in parents:
                    target, values = getattr(target, parent), values[parent]
                settings.append((target, name, values[name]))
        return Arrangement(nn.ModuleList([self.everything[i] for i in layers]), settings)

    @contextmanager
    def _running(self, arrangement: Arrangement) -> Iterator[None]:
        """Within the block the model's stack is that of ``arrangement``."""
        owner, name = self.stack.owner, self.stack.name
        before = getattr(owner, name), [(config, key, getattr(config, key)) for config, key, _ in arrangement.fields]
        try:
            setattr(owner, name, arrangement.layers)
            for config, key, value in arrangement.fields:
                setattr(config, key, value)
            yield
        finally:
            setattr(owner, name, before[0])
            for config, key, value in before[1]:
                setattr(config, key, value)

    @contextmanager
    def _as_teacher(self) -> Iterator[None]:
        """All layers, no adapter, the weights as they were before training."""
        with ExitStack() as undo:
            if self.adapter:
                undo.enter_context(self.model.disable_adapter())
            for parameter, frozen in self.twins:
                undo.callback(setattr, parameter, "data", parameter.data)
                parameter.data = frozen
            undo.enter_context(self._running(self._whole))
            yield

    @contextmanager
    def _listening(self, layers: Iterable[int], heard: dict[int, Tensor]) -> Iterator[None]:
        """Keep the hidden state that enters each of the base's ``layers``; their number is what leaves the last."""
        last = getattr(self.stack.owner, self.stack.name)[-1]
        with ExitStack() as hooks:
            for layer in layers:
                hear = partial(heard.__setitem__, layer)
                inside = layer < self.plan.layers
                hooks.enter_context(entering(self.everything[layer], hear) if inside else leaving(last, hear))
            yield

    @torch.no_grad()
    def teach(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Lesson:
        """One forward pass of the unpruned model over ``input_ids`` (batch, length)."""
        heard: dict[int, Tensor] = {}
        wanted = {*compared(self.settings, self.plan), *([self.shared_layers] if self.shared_layers else [])}
        with self._as_teacher(), self._listening(wanted, heard):
            logits = self.model(input_ids=input_ids, use_cache=False, **_apart(position_ids)).logits[:, :-1]
        shared = heard[self.shared_layers] if self.shared_layers else None
        return Lesson(*told(self.settings, logits), heard, shared)

    def loss(
        self,
        model: nn.Module,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """The student's loss on ``input_ids`` (batch, length), a mean over predicted tokens: hard + kl + aux, weighted.

        ``model`` is the student as the trainer wraps it. ``labels`` are -100 where hard is not to ask for the token.
        ``position_ids`` are places in documents that are kept apart.
        """
        lesson = self.teach(input_ids, position_ids)
        heard: dict[int, Tensor] = {}
        with ExitStack() as context:
            if lesson.shared is not None:
                context.enter_context(self._running(self._student))
                context.enter_context(given(self._student.layers[0], lesson.shared))
            context.enter_context(self._listening(compared(self.settings, self.plan), heard))
            logits = model(input_ids=input_ids, use_cache=False, **_apart(position_ids)).logits[:, :-1]
        labels = (input_ids if labels is None else labels)[:, 1:]
        return mixed(self.settings, self.plan, logits, labels, lesson, heard)


@dataclass
class TeacherApart:
    """The unpruned model beside a pruned one that shares no modules with it: repaired, narrowed, or of sublayers."""

    whole: Any
    settings: Terms
    plan: Plan

    def freeze_twins(self, student: Any, *, adapter: bool) -> None:
        """Nothing is shared."""

    @contextmanager
    def _listening(self, model: nn.Module, kept: Sequence[int], heard: dict[int, Tensor]) -> Iterator[None]:
        """Keep the hidden states that are compared, of a model of the base's layers ``kept``."""
        layers, places = find_stack(model).layers, [*kept, self.plan.layers]
        with ExitStack() as hooks:
            for layer in compared(self.settings, self.plan):
                place, hear = places.index(layer), partial(heard.__setitem__, layer)
                inside = place < len(layers)
                hooks.enter_context(entering(layers[place], hear) if inside else leaving(layers[-1], hear))
            yield

    def loss(
        self,
        model: nn.Module,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """As of `Teacher`."""
        apart = _apart(position_ids)
        theirs: dict[int, Tensor] = {}
        ours: dict[int, Tensor] = {}
        with torch.no_grad(), self._listening(self.whole, range(self.plan.layers), theirs):
            said = self.whole(input_ids=input_ids, use_cache=False, **apart).logits[:, :-1]
        lesson = Lesson(*told(self.settings, said), theirs, None)
        with self._listening(model, self.plan.kept, ours):
            logits = model(input_ids=input_ids, use_cache=False, **apart).logits[:, :-1]
        labels = (input_ids if labels is None else labels)[:, 1:]
        return mixed(self.settings, self.plan, logits, labels, lesson, ours)


def joints(plan: Plan) -> list[int]:
    """The base's layers that follow each cut; their number where a cut is the end.

    >>> joints(Plan(12, (2, 3, 4, 11)))
    [5, 12]
    """
    return [stop for _, stop in runs(plan.dropped)]


def after_cut(plan: Plan) -> list[int]:
    """The base's layers after the first cut that are kept, and their number, for what leaves the last.

    Of a cut that changes layers too, all.

    >>> after_cut(Plan(8, (2, 3, 5)))
    [4, 6, 7, 8]
    """
    first = plan.dropped[0] if plan.dropped and not plan.parts else 0
    return [layer for layer in (*plan.kept, plan.layers) if layer > first]


def compared(weights: Terms, plan: Plan) -> list[int]:
    """The base's layers whose inputs are compared, of which `after_cut` are those that the student has too."""
    return after_cut(plan) if weights.states else joints(plan) if weights.aux else []


def told(weights: Terms, logits: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """As `likeliest`; nothing where that is not asked for."""
    if not weights.kl:
        return None, logits.new_empty(0), None
    return likeliest(logits, weights.top_k, weights.temperature)


def mixed(
    weights: Terms, plan: Plan, logits: Tensor, labels: Tensor, lesson: Lesson, states: Mapping[int, Tensor]
) -> Tensor:
    """The weighted sum of what the student's ``logits`` (batch, length-1, vocabulary) and ``states`` cost."""
    logits = logits.float()
    loss = logits.new_zeros(())
    log_q = logits.log_softmax(-1)
    if weights.hard:
        loss = loss + weights.hard * functional.nll_loss(log_q.flatten(0, 1), labels.flatten())
    if weights.kl:
        if weights.temperature != 1:
            log_q = (logits / weights.temperature).log_softmax(-1)
        loss = loss + weights.kl * weights.temperature**2 * divergence(log_q, lesson).mean()
    for weight, layers in ((weights.aux, joints(plan)), (weights.states, after_cut(plan))):
        if weight:
            far = torch.stack([distance(states[layer], lesson.states[layer]) for layer in layers])
            loss = loss + weight * far.mean()
    return loss


def _apart(position_ids: Tensor | None) -> dict[str, Tensor]:
    return {} if position_ids is None else {"position_ids": position_ids}


def likeliest(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """``tokens``, ``log_p`` and ``log_rest`` of a `Lesson`, from the teacher's logits (batch, length-1, vocabulary)."""
    scaled = logits.float()
    if temperature != 1:
        scaled = scaled / temperature
    if not 0 < k < logits.shape[-1]:
        return None, scaled.log_softmax(-1), None
    top, tokens = scaled.topk(k, dim=-1)
    log_p = top - scaled.logsumexp(-1, keepdim=True)
    return tokens, log_p, _log_rest(log_p)


def divergence(log_q: Tensor, lesson: Lesson) -> Tensor:
    """KL(teacher || student) in nats per position, over the teacher's likeliest tokens and the rest as one outcome.

    ``log_q`` are the student's log-probabilities, (batch, length-1, vocabulary).
    """
    if lesson.tokens is None:
        return (lesson.log_p.exp() * (lesson.log_p - log_q)).sum(-1)
    log_q = log_q.gather(-1, lesson.tokens)
    kept = (lesson.log_p.exp() * (lesson.log_p - log_q)).sum(-1)
    assert lesson.log_rest is not None
    return kept + lesson.log_rest.exp() * (lesson.log_rest - _log_rest(log_q))


def _log_rest(log_p: Tensor) -> Tensor:
    """Log of the probability that ``log_p`` (..., k) leaves over, kept away from log 0 by float32's own precision."""
    return torch.log((1 - log_p.exp().sum(-1)).clamp_min(torch.finfo(torch.float32).eps))


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of hidden states over the teacher's squared length: eq. 8 of arXiv 2403.17887, unit-free."""
    difference = (student.float() - teacher.float()).square().sum(-1)
    return (difference / teacher.float().square().sum(-1).clamp_min(1e-12)).mean()
