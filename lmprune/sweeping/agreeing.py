"""How often each point of a sweep still says what the whole model says: one pass of each over the same text."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmprune.cuts.plan import Plan
from lmprune.forward.agreement import Said, said
from lmprune.forward.machine import release
from lmprune.forward.views import Views
from lmprune.models.cut import Cut, open_cut
from lmprune.models.fields import layer_count
from lmprune.sweeping.agreed import Agreed, Agreements
from lmprune.sweeping.folder import made_path
from lmprune.sweeping.points import BASELINE, Point
from lmprune.text.tokens import Tokens

LENGTH = 256
"""Tokens of a sample, at most."""
_say = logging.getLogger("lmprune").info


def agree(folder: Path, cut: Cut, points: Sequence[Point], tokens: Tokens, how: Mapping[str, Any]) -> Agreements:
    """Measure those of ``points`` that ``agreement.json`` in ``folder`` lacks, and write it.

    Args:
        cut: the whole model.
        how: as of `lmprune.models.loading.load_model`: device, dtype and, where the base is held so, quantization.

    Raises:
        DataError: no sample has a token to predict.
        ModelError: memory runs out even for one sample.
    """
    before = Agreements.read(folder)
    known = dict(before.points) if before is not None and before.hash == tokens.hash else {}
    todo = [point for point in points if point.name not in known]
    if before is not None and not todo:
        return before
    _say(f"agreement: {len(todo)} points on {tokens.samples} samples of {tokens.source}")
    whole = None
    for kind in dict.fromkeys([None, *(point.quantization for point in todo)]):
        several = [point for point in todo if not point.folder and point.quantization == kind]
        names = {point.name: point.plan for point in several} | ({BASELINE: None} if kind is None else {})
        found = _said(cut, names, tokens, {**how, **({"quantization": kind} if kind else {})})
        whole = whole or found[BASELINE]
        known |= {name: _compared(one, whole) for name, one in found.items()}
    assert whole is not None, "the first kind is the model as it is"
    for point in (point for point in todo if point.folder):
        made = open_cut(made_path(folder, point))
        known[point.name] = _compared(_said(made, {point.name: None}, tokens, how)[point.name], whole)
    done = Agreements(tokens.source, tokens.hash, int(whole.counts.sum()), len(whole.ids), known)
    done.write(folder)
    return done


def _said(cut: Cut, plans: Mapping[str, Plan | None], tokens: Tokens, how: Mapping[str, Any]) -> Mapping[str, Said]:
    """What these cuts of ``cut`` say, of one load."""
    model = cut.load(**how)
    whole = Plan(layer_count(model.config.to_dict()))
    found = said(Views(model, {name: plan or whole for name, plan in plans.items()}), tokens, say=_say)
    del model
    release()
    return found


def _compared(one: Said, whole: Said) -> Agreed:
    same, loss = one.same_as(whole), one.loss
    return Agreed(same.value, same.stderr, loss.value, loss.stderr)
