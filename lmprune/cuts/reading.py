"""What parts of a recipe are read with: plain data in, errors that name the place. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmprune.errors import RecipeError, check_keys, shown


def mapping_of(data: Any, keys: Sequence[str], where: str) -> dict[str, Any]:
    """``data``, a mapping with no other keys.

    Raises:
        RecipeError: it is none.
    """
    if not isinstance(data, dict):
        raise RecipeError(f"{where} is {shown(data)}, which is not a mapping of {', '.join(keys)}")
    check_keys(data, keys, where, RecipeError)
    return data


def layers_of(data: Any, layers: int, where: str, *, some: bool = False) -> tuple[int, ...]:
    """Numbers of layers of a model that has ``layers``, ascending; with ``some`` one at least.

    Raises:
        RecipeError: they are something else.
    """
    good = isinstance(data, list) and all(type(n) is int and 0 <= n < layers for n in data)
    if not good or sorted(set(data)) != data or (some and not data):
        raise RecipeError(f"{where} is {shown(data)}; list layers from 0 to {layers - 1}, ascending")
    return tuple(data)
