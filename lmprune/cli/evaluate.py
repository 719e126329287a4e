"""``lmprune eval`` and ``lmprune tasks``."""

from __future__ import annotations

import typer

from lmprune.cli import show
from lmprune.cli.options import with_options

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


def evaluate(context: typer.Context) -> None:
    """Run lm_eval with its own arguments, our model by default and our tasks included.

    pretrained is what may stand in a model's place everywhere: a recipe, a checkpoint, org/model or org/model@revision,
    or the word demo. Options are those of the harness, which `lm_eval run --help` lists; `lmprune eval ls tasks` lists
    the tasks. It writes its results as JSON with --output_path.

    Examples:
        lmprune eval --model_args pretrained=recipe.yml --tasks lmprune_quick --limit 100
        lmprune eval --model_args pretrained=demo,quantization=nf4 --tasks my_task --include_path my_tasks/
        lmprune eval ls tasks
    """
    from lmprune.evaluation.harness import run_command_line

    run_command_line(list(context.args))


@with_options()
def tasks() -> None:
    """Print the folder of our tasks, for lm_eval's --include_path.

    Examples:
        lmprune tasks
    """
    from lmprune.tasks_folder import tasks_folder

    show.result(str(tasks_folder()), {"out": tasks_folder()})
