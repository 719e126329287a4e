"""What `lm_eval` costs through lmprune against `--model hf` on the written checkpoint, for a cut of the demo model.

    python -m benchmarks.overhead [--turns N] [--limit N]

Both ways run in one process, in turns, each turn begun by the other one. Loading, scoring and generation are timed
apart; the last row is all of it. CPU seconds are what to trust on a busy machine. The smaller the model, the more any
overhead shows, and the demo model is as small as a model gets.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lmprune.choosing import choose, write_recipe
from lmprune.cuts.recipe import Recipe
from lmprune.evaluation.loaded import quiet_harness
from lmprune.evaluation.plugin import LmpruneLM
from lmprune.models.cut import open_cut
from lmprune.tasks_folder import tasks_folder
from lmprune.writing.pruning import prune

SCORING, GENERATION = ["lmprune_demo_facts", "lmprune_demo_loss"], ["lmprune_demo_arithmetic"]


def checkpoint(folder: Path, drop: int) -> tuple[Path, Path]:
    """The recipe of a cut, and the checkpoint that it gives."""
    base = open_cut("demo")
    write_recipe(base, choose(base, "deepest", drop=drop), folder / "recipe.yml")
    prune(Recipe.read(folder / "recipe.yml"), folder / "pruned")
    return folder / "recipe.yml", folder / "pruned"


def one_run(make: Callable[[], HFLM], manager: TaskManager, limit: int) -> tuple[dict[str, float], dict[str, Any]]:
    """CPU seconds of each part, and the numbers."""
    marks, found = [time.process_time()], {}
    model = make()
    marks.append(time.process_time())
    for tasks in (SCORING, GENERATION):
        done = lm_eval.simple_evaluate(
            model=model, tasks=tasks, task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=0
        )
        found |= {name: {k: v for k, v in row.items() if k != "alias"} for name, row in done["results"].items()}
        marks.append(time.process_time())
    spent = dict(zip(("loading", "scoring", "generation"), (b - a for a, b in zip(marks, marks[1:]))))
    return spent | {"all": marks[-1] - marks[0]}, found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--limit", type=int, default=48)
    parser.add_argument("--drop", type=int, default=3)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch, quiet_harness():
        recipe, pruned = checkpoint(Path(scratch), options.drop)
        manager = TaskManager(include_path=str(tasks_folder()), include_defaults=False)
        common = {"device": "cpu", "dtype": "float32", "batch_size": 16}
        ways: list[Callable[[], HFLM]] = [
            lambda: LmpruneLM("demo", recipe=str(recipe), **common),
            lambda: HFLM(pretrained=str(pruned), **common),
        ]
        spent: list[list[dict[str, float]]] = [[], []]
        for turn in range(options.turns + 1):
            numbers: list[Any] = [None, None]
            for which in ((0, 1), (1, 0))[turn % 2]:
                seconds, numbers[which] = one_run(ways[which], manager, options.limit)
                if turn:  # the first turn warms up
                    spent[which].append(seconds)
            assert numbers[0] == numbers[1], "the numbers differ"
    print("same numbers\n\n| part | lmprune, CPU s | hf, CPU s | ratio (median; min-max) |\n|---|---|---|---|")
    for part in ("loading", "scoring", "generation", "all"):
        ours, theirs = ([turn[part] for turn in way] for way in spent)
        ratios = [a / b for a, b in zip(ours, theirs)]
        print(
            f"| {part} | {statistics.median(ours):.2f} | {statistics.median(theirs):.2f} "
            f"| {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f}) |"
        )


if __name__ == "__main__":
    main()
