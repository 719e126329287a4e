"""The harness's index of tasks, of as few files as the asked names need: its own folder takes many seconds to read."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind

from lmprune.errors import UsageError, nearest
from lmprune.evaluation import LIST_TASKS
from lmprune.tasks_folder import tasks_folder


def manager_of(
    names: Sequence[str],
    metadata: Mapping[str, Any] | None = None,
    include_path: str | Path | None = None,
    *,
    option: str = "",
) -> TaskManager:
    """A manager that knows these tasks, tags and groups, and all that they hold.

    Where ours, or those in ``include_path``, are all that is named, it knows no others.

    Args:
        metadata: what tasks may ask of the model.
        option: what gave the names, for the message.

    Raises:
        UsageError: one of them does not exist.
    """
    folders = [str(tasks_folder()), *([str(include_path)] if include_path else [])]
    given = dict(metadata or {})
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=given)
    if all(each in manager.task_index for name in names for each in with_all(name, manager.task_index)):
        return manager
    if include_path is not None:  # whose files may change
        manager = TaskManager(include_path=folders, metadata=given)
    else:
        manager = copy.copy(_everything(folders[0]))
        manager.metadata, manager._factory = given, type(manager._factory)(meta=given)
    for name in names:
        if name not in manager.task_index:
            raise UsageError(f"{option}no task {name!r}{nearest(name, manager.all_tasks)}. See {LIST_TASKS}")
    return manager


@cache
def _everything(ours: str) -> TaskManager:
    """The index of all tasks, which is the same for every model."""
    return TaskManager(include_path=[ours])


def members(entry: Entry) -> Iterator[str]:
    """The names of what a group or a tag holds."""
    if entry.kind is Kind.TAG:
        yield from entry.tags
    elif entry.kind is Kind.GROUP:
        held = (entry.cfg or {}).get("task")
        for member in held if isinstance(held, list) else [held]:
            name = (member.get("group") or member.get("task")) if isinstance(member, dict) else member
            if name is not None:
                yield str(name)


def with_all(name: str, index: Mapping[str, Entry], seen: set[str] | None = None) -> Iterator[str]:
    """It, what it holds, what that holds, each once; also names that are not in the index."""
    seen = set() if seen is None else seen
    if name in seen:
        return
    seen.add(name)
    yield name
    for member in members(index[name]) if name in index else ():
        yield from with_all(member, index, seen)
