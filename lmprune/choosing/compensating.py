"""From a choice to the same with its loss of magnitude made up for (Prune&Comp, arXiv 2507.18212), by mergekit."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from operator import mul
from typing import Any

import torch

from lmprune.choosing.evidence import ModelEvidence
from lmprune.criteria.evidence import Choice
from lmprune.cuts.compensation import Compensation
from lmprune.errors import ModelError, UsageError
from lmprune.forward.batches import Batch
from lmprune.forward.calls import changing
from lmprune.forward.views import pruned_view
from lmprune.healing.scaling import TOLERANCE, Scale, factors_of, logits_of, scales_of
from lmprune.models.stack import find_stack, unwrapped

_INSTEAD = "Use `lmprune heal RECIPE OUT --method scalar`, or refit"


def compensated(made: Choice, evidence: ModelEvidence) -> Choice:
    """``made`` with a factor for each cut, from the text that is chosen on: what `lmprune.healing.scaling` folds.

    Raises:
        UsageError: no layer follows a cut, or something is cut already.
        ModelError: a factor cannot be said by names of tensors.
    """
    cut, plan = evidence.cut, made.plan
    if cut.plan is not None:
        raise UsageError(f"--compensate: {cut.name} is cut already. Give the uncut model, and all that goes")
    if plan.parts:
        raise UsageError(f"--compensate: the cut {plan.describe()}, and only whole layers are compensated. {_INSTEAD}")
    if cut.whole_config.to_dict().get("quantization_config"):
        raise UsageError(f"--compensate: {cut.name} is quantised, and cannot be multiplied. Give its base")
    model, rows = evidence.model, list(evidence.text.rows)
    scales = scales_of(model, plan, rows)
    bare = pruned_view(model, plan)
    part = _named(bare, made, scales, rows[:1], set(cut.checkpoint.tensors))
    whole = replace(plan, parts=(part,))
    _require_same(bare, pruned_view(model, whole), scales, rows[:1])
    return replace(made, plan=whole)


def _named(bare: Any, made: Choice, scales: tuple[Scale, ...], rows: list[Any], stored: set[str]) -> Compensation:
    """The part that multiplies the parameters of the live cut model, by the names that they have in a checkpoint."""
    factors, stack, plan = factors_of(bare, scales, rows), find_stack(bare), made.plan
    kind = unwrapped(bare).config.model_type
    part = Compensation(tuple(plan.kept[s.place] for s in scales), tuple(s.alpha for s in scales), ())
    layers: list[str] = []
    embeddings: list[str] = []
    norms: list[str] = []
    for name, parameter in unwrapped(bare).named_parameters():
        if parameter not in factors:
            continue
        factor, offset = factors[parameter]
        if offset:
            raise ModelError(
                f"--compensate: {kind} stores its norms less {offset:.0f}, which no factor says. {_INSTEAD}"
            )
        number, _, rest = name.removeprefix(f"{stack.path}.").partition(".")
        inside = name.startswith(f"{stack.path}.")
        if (f"{stack.path}.{plan.kept[int(number)]}.{rest}" if inside else name) not in stored:
            raise ModelError(f"--compensate: {kind} calls {name} otherwise in its checkpoints. {_INSTEAD}")
        into = layers if inside else embeddings if factor == part.everywhere else norms
        into += [named for named in [rest if inside else name] if named not in into]
    return replace(part, layers=tuple(layers), embeddings=tuple(embeddings), norms=tuple(norms))


@torch.no_grad()
def _require_same(bare: Any, scaled: Any, scales: tuple[Scale, ...], rows: list[Any]) -> None:
    """Make sure that the multiplied tensors do what multiplying the states does.

    Raises:
        ModelError: they do not.
    """
    batch = Batch.of([row[:32] for row in rows], next(bare.parameters()).device)
    untouched = logits_of(bare, batch)
    with ExitStack() as hooks:
        for scale in scales:
            hooks.enter_context(changing(find_stack(bare).layers[scale.place], partial(mul, scale.alpha)))
        wanted = logits_of(bare, batch)
    wrong, change = float((logits_of(scaled, batch) - wanted).norm()), float((wanted - untouched).norm())
    rounding = torch.finfo(next(bare.parameters()).dtype).eps * float(wanted.norm())
    if not wrong <= TOLERANCE * change + 8 * rounding:
        raise ModelError(
            f"--compensate: {unwrapped(bare).config.model_type}: multiplied tensors differ from multiplied states by "
            f"{wrong / change:.2g} of the change itself. {_INSTEAD}"
        )
