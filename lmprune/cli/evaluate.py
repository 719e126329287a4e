"""``lmprune eval`` and ``lmprune tasks``."""

from __future__ import annotations

import typer

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


def evaluate(context: typer.Context) -> None:
    """Run lm_eval with its own arguments, our model by default and our tasks included."""
    from lmprune.evaluation.harness import run_command_line

    run_command_line(list(context.args))


def tasks() -> None:
    """Print the folder of our tasks, for lm_eval's --include_path."""
    from lmprune.tasks_folder import tasks_folder

    print(tasks_folder())
