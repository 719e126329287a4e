"""The harness as our commands call it: its own command line, with our model and tasks already known to it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmprune.errors import UsageError, nearest
from lmprune.evaluation import LIST_TASKS
from lmprune.evaluation.failing import in_our_words
from lmprune.tasks_folder import tasks_folder


def run_command_line(arguments: list[str]) -> None:
    """Run ``lm_eval`` with ``arguments``; the model defaults to ours and our tasks are always found.

    Raises:
        UsageError: the harness does not understand the arguments, or knows no such task.
        HostError: the harness failed.
    """
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.utils import setup_logging

    import lmprune.evaluation.plugin  # noqa: F401  (registers the model, so that no shim is needed)

    if not any(word == "--model" or word.startswith("--model=") or word == "-M" for word in arguments):
        arguments = ["--model", "lmprune", *arguments]
    setup_logging()
    argv = sys.argv
    try:
        # Its parser reads nothing else. Our tasks are added after parsing, for its option knows one folder only.
        sys.argv = ["lmprune eval", "run", *arguments]
        harness = HarnessCLI()
        parsed = harness.parse_args()
        theirs = getattr(parsed, "include_path", None)
        parsed.include_path = [str(tasks_folder()), *([theirs] if theirs else [])]
        with in_our_words():
            harness.execute(parsed)
    finally:
        sys.argv = argv


def evaluate(
    model: str | Path | Mapping[str, Any],
    tasks: str | Sequence[str],
    *,
    batch_size: int | str = 32,
    limit: int | None = None,
) -> dict[str, Any]:
    """Evaluate one model by our plugin on ``tasks``, without a word, and return the harness's results.

    Args:
        model: what may stand in a model's place; or the harness's model_args, such as ``pretrained`` and ``recipe``.
            Tasks are given these too, as on the harness's command line: the normalised loss needs the tokenizer.
        tasks: names of tasks or groups; ours are always found.
        limit: documents of each task, at most.

    Raises:
        UsageError: a task does not exist.
        HostError: the harness failed.
    """
    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager

    from lmprune.evaluation.loaded import quiet_harness
    from lmprune.evaluation.plugin import LmpruneLM

    model_args = dict(model) if isinstance(model, Mapping) else {"pretrained": str(model)}
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    manager = TaskManager(include_path=str(tasks_folder()), metadata=dict(model_args))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UsageError(f"no task {unknown[0]!r}{nearest(unknown[0], manager.all_tasks)}. See {LIST_TASKS}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with quiet_harness(bars=False), in_our_words():
        live = LmpruneLM(**{"device": device, "batch_size": batch_size} | model_args)
        results: dict[str, Any] = lm_eval.simple_evaluate(
            model=live,
            tasks=tasks,
            task_manager=manager,
            limit=limit,
            log_samples=False,
            bootstrap_iters=1000,
        )
    return results
