"""Tables that outside packages may add to by an entry point: criteria, healing methods. Pure."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from lmprune.errors import HostError, UsageError, nearest

T = TypeVar("T")


@cache
def _offered(group: str, _path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """What installed packages offer: a file of each is read, so once for each ``sys.path``."""
    return {point.name: point for point in entry_points(group=group)}


class Table(Mapping[str, T], Generic[T]):
    """What goes by which name: our own, then what installed packages offer under the entry-point group ``group``.

    An outside entry is imported when it is first asked for; of two of one name, ours counts.

    Args:
        option: how the user names one, for messages: ``--criterion``.
        needs: the attributes without which an outside entry is none.
    """

    def __init__(self, option: str, group: str, own: Mapping[str, T], needs: tuple[str, ...] = ()) -> None:
        self._option, self._group, self._own, self._needs = option, group, own, needs

    def _outside(self) -> dict[str, EntryPoint]:
        offered = _offered(self._group, tuple(sys.path))
        return {name: point for name, point in offered.items() if name not in self._own}

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from sorted(self._outside())

    def __len__(self) -> int:
        return len(self._own) + len(self._outside())

    def __getitem__(self, name: str) -> T:
        if name in self._own:
            return self._own[name]
        point = self._outside()[name]
        try:
            found: T = point.load()
        except Exception as exc:  # whatever another package raises while it is imported
            raise HostError(f"{self._option} {name}: {point.value} cannot be loaded: {exc}") from exc
        lacking = [attribute for attribute in self._needs if not hasattr(found, attribute)]
        lacking += sorted(getattr(found, "__abstractmethods__", ()))  # of a class that leaves a method to be written
        if lacking:
            raise HostError(f"{self._option} {name}: {point.value} has no {lacking[0]!r}")
        return found

    def find(self, name: str) -> T:
        """The entry called ``name``.

        Raises:
            UsageError: there is none.
            HostError: it is another package's, and cannot be loaded.
        """
        if name not in self:
            _offered.cache_clear()  # it may have been installed meanwhile, as from a notebook
        if name not in self:
            raise UsageError(
                f"{self._option} {name!r} does not exist{nearest(name, self)}. Choose from {', '.join(self)}"
            )
        return self[name]
