"""The kinds of plan besides whole layers: how each is read from a recipe.

A kind is one file with a `Part` class, one line in `KINDS` and one in `lmprune.models.carrying.CARRIERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmprune.cuts.compensation import Compensation
from lmprune.cuts.patch import Patch
from lmprune.cuts.plan import Part
from lmprune.cuts.sublayers import Sublayers
from lmprune.cuts.width import Width
from lmprune.errors import RecipeError, nearest, shown

Read = Callable[[Any, int, str, Path | None], Part]
"""From plain data, the number of the uncut model's layers, where the data stand, for messages, and the recipe's folder,
where a file beside it lies."""

KINDS: dict[str, Read] = {
    "compensation": Compensation.read,
    "patch": Patch.read,
    "sublayers": Sublayers.read,
    "width": Width.read,
}


def read_parts(data: Any, layers: int | None, where: str, folder: Path | None = None) -> tuple[Part, ...]:
    """The parts under ``lmprune: parts:`` of a recipe that lies in ``folder``, by kind.

    Raises:
        RecipeError: a kind is unknown or cannot be carried out, or its data are wrong.
    """
    if data is None:
        return ()
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: parts is {shown(data)}, which is not a mapping of kinds")
    for kind in data:
        if kind not in KINDS:
            raise RecipeError(f"{where}: there is no kind {kind!r} of cut{nearest(str(kind), KINDS)}")
    if data and layers is None:
        raise RecipeError(f"{where}: a recipe with parts must say how many layers its model has, as lmprune.layers")
    return tuple(KINDS[kind](data[kind], layers or 0, f"{where}: parts.{kind}", folder) for kind in sorted(data))
