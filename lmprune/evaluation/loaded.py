"""Tasks by name, loaded once and used for every model of a sweep."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval.api.model
import lm_eval.api.task
import lm_eval.evaluator
import lm_eval.models.huggingface
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from torch.utils import collect_env

from lmprune.errors import UsageError
from lmprune.evaluation.failing import in_our_words
from lmprune.evaluation.indexing import manager_of, with_all

DEMO_TASKS = ("lmprune_demo",)
USUAL_TASKS = ("lmprune_quick",)
DEMO_STEPS, USUAL_STEPS = "lmprune_demo_arithmetic", "gsm8k_cot"
"""The multi-step task that is added where none was asked for."""


class LoadedTasks(TaskManager):
    """The tasks ``names`` with their data. To the harness it is a task manager that has them already.

    Args:
        metadata: what tasks may ask of the model: its model_args.
        steps: the multi-step task that is added where ``names`` hold none.
        include_path: a folder with tasks besides the harness's and ours.

    Attributes:
        names: as given to the harness.
        added: ``steps``, if it was added.

    Raises:
        UsageError: there is no such task, or two of them set one task differently.
        NetworkError: a task's data are not on this machine and cannot be fetched.
        HostError: a task cannot be loaded.
    """

    def __init__(
        self, names: Sequence[str], metadata: Mapping[str, Any], *, steps: str, include_path: str | None = None
    ) -> None:
        if include_path is not None and not Path(include_path).is_dir():
            raise UsageError(f"--include_path {include_path}: no such folder. Give one with tasks of the harness")
        self.names = list(dict.fromkeys(names))
        manager = manager_of(self.names, metadata, include_path)
        self.added = None if any(_generates(manager, name) for name in self.names) else steps
        if self.added and any(name not in manager.task_index for name in with_all(self.added, manager.task_index)):
            manager = manager_of([*self.names, self.added], metadata, include_path)
        self.__dict__.update(vars(manager))  # what was read is not read again
        if self.added:
            self.names.append(self.added)
        with quiet_harness():
            self._loaded = self._load()
        self._few_shots()

    def only(self, names: Sequence[str]) -> LoadedTasks:
        """Those of them that are called ``names``."""
        if list(names) == self.names:
            return self
        part = copy.copy(self)
        part.names = list(names)
        with quiet_harness():
            part._loaded = TaskManager.load(self, part.names)
        part._few_shots()
        return part

    def _few_shots(self) -> None:
        for task in self.tasks.values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)

    def load(self, task_list: Any) -> Any:
        """The harness's form of all tasks, whatever it asks for."""
        return self._loaded

    def _load(self) -> Any:
        for name in self.names:
            with in_our_words(name):
                super().load([name])
        try:
            return super().load(self.names)
        except ValueError as exc:
            raise UsageError(f"--tasks {','.join(self.names)}: {exc}. Name each task once") from exc

    @property
    def tasks(self) -> dict[str, Task]:
        """Every single task by name."""
        tasks: dict[str, Task] = self._loaded["tasks"]
        return tasks

    @property
    def generative(self) -> list[str]:
        """The tasks that write text: multi-step ones, as a sweep needs."""
        return [name for name, task in self.tasks.items() if task.OUTPUT_TYPE == "generate_until"]

    def data(self, limit: int | None) -> dict[str, dict[str, Any]]:
        """What each task asks: source, number and hash of the documents, shots, version."""
        return {name: _describe(task, limit) for name, task in sorted(self.tasks.items())}


def _generates(manager: TaskManager, name: str) -> bool:
    """Whether ``name`` is, or holds, a task that writes text; by its file alone, before any data are read."""
    from lm_eval.tasks._yaml_loader import load_yaml

    index = manager.task_index
    files = [index[each].yaml_path for each in with_all(name, index) if each in index]
    return any(
        load_yaml(file, resolve_func=False).get("output_type") == "generate_until" for file in files if file is not None
    )


@contextmanager
def quiet_harness(*, bars: bool = True) -> Iterator[None]:
    """While the block runs our evaluations, the harness shows its errors alone; nothing stays changed after it.

    Its bars stay on a terminal where ``bars`` lets them.
    """
    logger, level = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    instead: list[tuple[Any, str, Any]] = [
        # Outside a repository, git complains on the terminal about each model.
        (lm_eval.evaluator, "get_git_commit_hash", _commit),
        # Two seconds of asking the machine, for each model anew.
        (collect_env, "get_pretty_env_info", _environment),
    ]
    if not (bars and sys.stderr.isatty()):
        # In a log they are thousands of lines, and the harness has no setting that turns off all of them.
        instead += [(module, "tqdm", _without_a_bar(module.tqdm)) for module in _WITH_BARS]
    before = [(module, name, getattr(module, name)) for module, name, _ in instead]
    try:
        logger.setLevel(logging.ERROR)  # it warns of things that we set on purpose
        for module, name, ours in instead:
            setattr(module, name, ours)
        yield
    finally:
        logger.setLevel(level)
        for module, name, theirs in before:
            setattr(module, name, theirs)


_WITH_BARS = (lm_eval.models.huggingface, lm_eval.api.model, lm_eval.api.task)


_environment = cache(collect_env.get_pretty_env_info)


def _without_a_bar(bar: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: bar(*args, **kwargs | {"disable": True})


def _commit() -> str | None:
    """The commit of the working folder; the harness's own lets git complain where there is none."""
    try:
        done = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def _describe(task: Task, limit: int | None) -> dict[str, Any]:
    digest, count, guessed = hashlib.sha256(), 0, 0.0
    chooses = task.OUTPUT_TYPE == "multiple_choice" and task.config.doc_to_choice is not None
    for doc in task.eval_docs:
        if limit is not None and count == limit:
            break
        digest.update(json.dumps(doc, sort_keys=True, default=str, ensure_ascii=False).encode())
        guessed += 1 / len(task.doc_to_choice(doc)) if chooses else 0.0
        count += 1
    config = task.config
    return {
        "dataset": config.dataset_path,
        "subset": config.dataset_name,
        "documents": count,
        "hash": digest.hexdigest()[:16],
        "shots": config.num_fewshot,
        "version": str(task.VERSION if config.metadata is None else config.metadata.get("version", task.VERSION)),
    } | ({"chance": guessed / count} if chooses and count else {})
