"""Cuts as a repair leaves them: what ``--after METHOD`` judges, on the model that is loaded already."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lmprune.cuts.plan import Plan, spell
from lmprune.errors import DataError, UsageError
from lmprune.healing.facts import Facts
from lmprune.healing.methods import METHODS, find_method
from lmprune.healing.methods.base import Repairing
from lmprune.healing.presets import resolve
from lmprune.healing.settings import HealSettings
from lmprune.models.cut import Cut
from lmprune.text.tokens import Tokens, joined

if TYPE_CHECKING:
    from torch import nn

_say = logging.getLogger("lmprune").info
HELD = 5
"""Each fifth block is what a method may choose by; it is fitted on the others."""
FIT_BLOCKS = 256
"""At most: cuts are compared, each after a repair of its own, and the one that is chosen is repaired on more later."""


def known_repair(name: str) -> type[Repairing]:
    """The method of that name, which trains nothing.

    Raises:
        UsageError: there is none, or it trains.
        HostError: it is another package's, and cannot be loaded.
    """
    way = find_method(name).way
    if not issubclass(way, Repairing):
        able = ", ".join(key for key in METHODS if issubclass(METHODS[key], Repairing))
        raise UsageError(f"--after {name}: it trains, and cuts are judged after what trains nothing. Give {able}")
    return way


def blocks_of(text: Tokens, cut: Cut, length: int) -> tuple[int, Iterator[list[int]]]:
    """``text`` in blocks as `lmprune heal` packs it, of ``length`` tokens or of the window, or as it is packed already.

    A model that is fitted on short documents by themselves has seen their first positions alone.
    """
    if text.settings.pack:
        return len(text.rows[0]), (row.tolist() for row in text.rows)
    length = min(length, cut.window or length)
    rows, _ = joined((row.tolist() for row in text.rows), cut.tokenizer(), text.settings, length)
    return length, rows


def tokens_wanted(way: Repairing | type[Repairing]) -> int:
    """Tokens of text that such a repair is made from."""
    return min(way.fit_blocks, FIT_BLOCKS) * way.max_length * HELD // (HELD - 1)


@dataclass(frozen=True)
class Repairer:
    """Repairs cuts of one model as `lmprune heal` does by default, but on less text, which nothing is judged on.

    Attributes:
        cut: the model.
        text: samples that the repair may be fitted on.
    """

    method: str
    cut: Cut
    text: Tokens

    def repaired(self, whole: Any, plan: Plan) -> nn.Module:
        """A model of its own: the live ``whole`` without what ``plan`` drops, repaired, in ``whole``'s type.

        Raises:
            UsageError, ModelError: the repair does not fit the model.
            DataError: the text does not fill two blocks.
        """
        from lmprune.forward.views import pruned_view
        from lmprune.healing.repairing import Repair
        from lmprune.healing.student import prepare

        began = time.monotonic()
        settled, _ = resolve(HealSettings(method=self.method), Facts.of(self.cut.without(plan, self.cut.name)))
        way = settled.way
        assert isinstance(way, Repairing)
        fit, held = self._blocks(way)
        dtype = next(whole.parameters()).dtype
        teacher = whole if str(dtype) == "torch.float32" else copy.deepcopy(whole).float()
        student, _ = prepare(copy.deepcopy(pruned_view(teacher, plan)), way, plan, settled.seed)
        noisy = logging.getLogger("lmprune")
        level = noisy.level
        noisy.setLevel(logging.WARNING)  # each solve is of interest where it is written, not in a search
        try:
            way.repair(Repair(student.eval(), teacher.eval(), plan, fit, held, self.text.unscored))
        finally:
            noisy.setLevel(level)
        _say(f"{self.method} of {spell(plan.dropped)}: {time.monotonic() - began:.0f} s")
        done: nn.Module = student.to(dtype).requires_grad_(False)
        return done

    def _blocks(self, way: Repairing) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Token ids to fit on and to choose by, (blocks, length) each."""
        length, rows = blocks_of(self.text, self.cut, way.max_length)
        blocks = list(islice(rows, max(HELD, -(-tokens_wanted(way) // length))))
        if len(blocks) < HELD:
            raise DataError(
                f"--after {self.method}: {self.text.source} leaves {len(blocks)} blocks of {length} tokens to repair "
                f"on, and it takes {HELD}. Give more --samples, or more text"
            )
        ids = np.asarray(blocks, np.int32)
        held = np.arange(len(ids)) % HELD == HELD - 1
        return ids[~held], ids[held]
