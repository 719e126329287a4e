"""One model through the harness, and its results file as the harness writes it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.loggers import EvaluationTracker

from lmprune.errors import HostError
from lmprune.evaluation.failing import in_our_words
from lmprune.evaluation.loaded import LoadedTasks, quiet_harness
from lmprune.evaluation.plugin import LmpruneLM
from lmprune.evaluation.rows import results_in
from lmprune.files import new_folder, write_json


def evaluate_point(
    model: LmpruneLM,
    tasks: LoadedTasks,
    folder: Path,
    *,
    model_args: Mapping[str, Any],
    batch_size: int | str,
    limit: int | None,
    seed: int,
    provenance: Mapping[str, Any],
) -> None:
    """Evaluate ``model`` and write ``folder`` with the harness's results and samples files.

    Where ``folder`` holds results already, a new file of results stands beside theirs, with both in it.

    Args:
        model_args: how lm_eval makes this model by itself, for the file.
        provenance: kept under the key ``lmprune`` of the results.

    Raises:
        HostError: the harness failed.
        OutputError: ``folder`` cannot be written.
    """
    apart = folder.with_name(f".{folder.name}.more") if folder.is_dir() else folder
    if apart != folder:
        shutil.rmtree(apart, ignore_errors=True)  # of a run that was killed
    with new_folder(apart) as half, quiet_harness():
        with in_our_words():
            results = lm_eval.simple_evaluate(
                model=model,
                tasks=tasks.names,
                task_manager=tasks,
                batch_size=batch_size,
                device=str(model.device),
                limit=limit,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        samples = results.pop("samples")
        results["config"] |= {"model": "lmprune", "model_args": dict(model_args)}
        results["lmprune"] = dict(provenance)
        tracker = EvaluationTracker(output_path=str(half / "results.json"))
        tracker.general_config_tracker.log_experiment_args("lmprune", dict(model_args), None, None, False)
        tracker.save_results_aggregated(results, samples)
        for name in tasks.generative:
            tracker.save_results_samples(name, samples[name])
        if not any(half.glob("results_*.json")):  # the tracker only warns
            raise HostError(f"lm_eval could not write the results of {folder.name}: is the disk full?")
    if apart != folder:
        _add(apart, folder)
        shutil.rmtree(apart)


_BY_TASK = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
"""What a results file says task by task."""


def _add(new: Path, folder: Path) -> None:
    """Bring the results in ``new`` into ``folder``; those that are there stay until the file with both is whole."""
    before, after = results_in(folder), results_in(new)
    assert before is not None and after is not None, "both have been written"
    both = dict(after.raw)
    for key in (*_BY_TASK, "task_hashes"):
        if key in before.raw or key in after.raw:
            both[key] = {**before.raw.get(key, {}), **after.raw.get(key, {})}
    for file in new.glob("samples_*.jsonl"):
        shutil.copyfile(file, folder / file.name)
    write_json(folder / after.path.name, both)
