"""A sweep's folder as `lmprune sweep` leaves it, of made-up scores: to test what is said of it, without measuring."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from test_plotting import some_profile

from lmprune.benching.rows import Bench, Ratio, Row
from lmprune.choosing import write_recipe
from lmprune.cuts.lineage import Lineage
from lmprune.cuts.plan import Plan
from lmprune.files import write_json
from lmprune.models.cut import open_cut
from lmprune.sweeping.agreed import Agreed, Agreements
from lmprune.sweeping.folder import Sweep, made_path
from lmprune.sweeping.points import Point

SCORES = {
    "baseline": {"facts": (0.9, 0.03), "sums": (0.8, 0.04), "loss": (0.5, None)},
    "angular-02": {"facts": (0.88, 0.03), "sums": (0.2, 0.04), "loss": (0.75, None)},
    "deepest-02": {"facts": (0.89, 0.03), "sums": (0.79, 0.04), "loss": (0.6, None)},
}
CUTS = {"angular-02": (3, 4), "deepest-02": (5, 6)}
METRICS = {"facts": "acc,none", "sums": "exact_match,answer", "loss": "bits_per_byte,none"}


def write_run(
    base: Path,
    folder: Path,
    *,
    limit: int | None = None,
    datasets: dict[str, str] | None = None,
    quantizations: tuple[str, ...] = (),
    agreed: bool = False,
    made: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """The folder of a sweep of ``base``, a model of 8 layers, that measured `CUTS`, in ``quantizations`` too.

    Args:
        made: ``repaired`` or ``healed`` -> what checkpoints of every cut say of how that was done.
    """
    opened = open_cut(base)
    model = {"name": str(base), "path": str(base), "revision": None, "layers": 8, "dtype": "float32"}
    model["fingerprint"] = opened.checkpoint.fingerprint
    points = [Point("baseline", None, 8, ())]
    points += [Point(name, name[:-3], 8, dropped) for name, dropped in CUTS.items()]
    points += [point.made_into(kind) for kind in quantizations for point in list(points) if not point.made]
    points += [
        point.made_into(kind) for kind in made or {} for point in list(points) if point.is_cut and not point.made
    ]
    data = {task: {"dataset": (datasets or {}).get(task), "documents": 100, "shots": 0} for task in METRICS}
    settings = {"seed": 1, "limit": limit}
    hardware = {"device": "cpu", "machine": "x86_64", "cores": 2, "cpu": "some processor"}
    sweep = Sweep(model, settings, tuple(points), tuple(METRICS), data, {"shared": 1, "separate": 2}, {}, hardware)
    folder.mkdir()
    sweep.write(folder)
    for point in points:
        write_json(folder / "results" / point.name / "results_2026.json", _results(sweep, point, limit))
        for task in ("sums",):
            (folder / "results" / point.name / f"samples_{task}_2026.jsonl").write_text(json.dumps(_SAMPLE) + "\n")
        if point.plan is not None and not point.made:
            write_recipe(opened, Plan(8, point.dropped), folder / "recipes" / f"{point.name}.yml")
        if point.folder:
            made_path(folder, point).mkdir(parents=True)
            Lineage(stage="heal", plan=point.plan, healing=(made or {})[point.made]).write(made_path(folder, point))
    profile = replace(some_profile(8), model=str(base), fingerprint=model["fingerprint"])
    profile.write(folder / "profile.json")
    bench = Bench(tuple(_row(point) for point in points if not point.folder), {"runs": 3, "warmup": 1}, "cpu", 1)
    write_json(folder / "bench.json", bench.to_data())
    if agreed:
        found = {point.name: Agreed(1 - point.n / 8, 0.01, 0.5 + point.n, 0.02) for point in points}
        Agreements("text.txt", "sha256:0", 1234, 8, found).write(folder)
    return folder


_SAMPLE = {
    "doc_id": 0, "target": "4", "resps": [["4"]], "metrics": ["exact_match"], "exact_match": 1.0,
    "arguments": {"gen_args_0": {"arg_0": "2 + 2 ="}},
}  # fmt: skip


def _results(sweep: Sweep, point: Point, limit: int | None) -> dict[str, Any]:
    results = {}
    for task, (value, stderr) in SCORES[point.unhealed].items():
        name, _, chosen = METRICS[task].partition(",")
        results[task] = {f"{name},{chosen}": value, f"{name}_stderr,{chosen}": "N/A" if stderr is None else stderr}
    kinds = {"facts": "multiple_choice", "sums": "generate_until", "loss": "loglikelihood_rolling"}
    return {
        "results": results,
        "configs": {task: {"output_type": kind} for task, kind in kinds.items()},
        "higher_is_better": {"loss": {"bits_per_byte": False}},
        "config": {"limit": limit, "random_seed": 1},
        "lm_eval_version": "0.4.13",
        "lmprune": {"data": sweep.data, "base": dict(sweep.model), "point": point.to_data()},
    }


def _row(point: Point) -> Row:
    ratio = Ratio(8 / (8 - point.n), 1.0, 1.5)
    speeds = (100.0, 0.1, 0.2, 10.0, 0.1, 0.2, None, None, None)
    weights = (1000 - 100 * point.n, 2_000_000 - 200_000 * point.n)
    return Row(point.name, 8 - point.n, *weights, point.quantization, 16, 1, *speeds, ratio.median, ratio, ratio)
