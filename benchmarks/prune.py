"""Speed and memory of pruning and of partial loading, as ratios measured side by side in one run.

    python -m benchmarks.prune [--gib 1.0] [--turns 7] [--scratch DIR]

Makes a random bf16 Llama, keeps every second layer, and measures, in turns and each in a fresh process after start-up,
into new files and from the page cache: copying the kept bytes with cp, `lmprune prune --no-verify` with each writer,
and loading whole and half. Start-up is over once the same job has run on a model of a few megabytes: the hosts import
much of themselves only when they are used.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAYERS = 16


def make_model(folder: Path, gib: float) -> None:
    """A random bf16 Llama of at least that size, in shards of a quarter of it; its width is a multiple of 128."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = math.ceil((gib * 2**30 / 2 / LAYERS / 12) ** 0.5 / 128) * 128  # 12 h² parameters in a layer
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64 // 2,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(torch.int16).random_(0, 15000)
    model.save_pretrained(folder, max_shard_size=int(gib * 2**30 / 4))


def plan() -> Any:
    from lmprune.cuts.plan import Plan

    return Plan.from_kept(LAYERS, range(0, LAYERS, 2))


def prepare_cp(source: Path, out: Path) -> Callable[[], Any]:
    kept = source.with_name(f"{source.name}-kept")
    return lambda: subprocess.run(["cp", "-r", str(kept), str(out)], check=True)


def prepare_copy(source: Path, out: Path) -> Callable[[], Any]:
    return _prepare_prune(source, out, "copy")


def prepare_mergekit(source: Path, out: Path) -> Callable[[], Any]:
    return _prepare_prune(source, out, "mergekit")


def prepare_auto(source: Path, out: Path) -> Callable[[], Any]:
    return _prepare_prune(source, out, "auto")


def _prepare_prune(source: Path, out: Path, writer: Any) -> Callable[[], Any]:
    """All that ``lmprune prune --no-verify`` does."""
    from lmprune.cuts.recipe import Recipe
    from lmprune.writing.pruning import prune

    recipe = Recipe(str(source), tuple(plan().slices()), layers=LAYERS)
    return lambda: prune(recipe, out, writer=writer, check=False)


def prepare_whole(source: Path, out: Path) -> Callable[[], Any]:
    return _prepare_load(source, None)


def prepare_half(source: Path, out: Path) -> Callable[[], Any]:
    return _prepare_load(source, plan())


def _prepare_load(source: Path, cut: Any) -> Callable[[], Any]:
    from lmprune.models.loading import load_model

    def load() -> float:
        model = load_model(source, plan=cut)
        return float(sum(parameter.flatten()[::1024].float().sum() for parameter in model.parameters()))

    return load


JOBS = {
    "cp": prepare_cp,
    "copy": prepare_copy,
    "mergekit": prepare_mergekit,
    "auto": prepare_auto,
    "load whole": prepare_whole,
    "load half": prepare_half,
}


def child(job: str, source: Path, out: Path) -> None:
    """Run one job and print its seconds and the peak memory above where it started, in MB."""
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        JOBS[job](source.with_name("small"), Path(scratch) / "out")()
    run = JOBS[job](source, out)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = _memory("VmRSS")
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "mb": _memory("VmHWM") - before}))


def _memory(field: str) -> float:
    """A field of this process's status, in MB; ru_maxrss would carry the parent's peak over."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def measure(job: str, source: Path, out: Path) -> dict[str, float]:
    """Seconds and peak of one run of one job in a process of its own, into the new folder ``out``."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.prune", "--child", job, "--source", str(source), "--out", str(out)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    shutil.rmtree(out, ignore_errors=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def in_turns(source: Path, turns: int) -> dict[str, dict[str, float]]:
    """Every job once in each turn: its median and fastest seconds, and its largest peak."""
    runs: dict[str, list[dict[str, float]]] = {job: [] for job in JOBS}
    for turn in range(turns):
        for job in JOBS:
            _warm(source.parent)
            runs[job].append(measure(job, source, source.parent / f"out-{turn}"))
    return {
        job: {
            "median": statistics.median(run["seconds"] for run in found),
            "fastest": min(run["seconds"] for run in found),
            "mb": max(run["mb"] for run in found),
        }
        for job, found in runs.items()
    }


def _warm(folder: Path) -> None:
    """Read every weight once, so that all jobs find them in the page cache."""
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as weights:
            while weights.read(1 << 24):
                pass


def report(found: dict[str, dict[str, float]], shard_mb: float) -> str:
    """The table, and the ratios beside what is promised."""
    lines = ["| job | median (s) | fastest (s) | peak above the start (MB) |", "|---|---|---|---|"]
    lines += [f"| {job} | {run['median']:.2f} | {run['fastest']:.2f} | {run['mb']:.0f} |" for job, run in found.items()]
    lines += ["", "| ratio | of medians | of fastest | promised |", "|---|---|---|---|"]
    for job, to, promise in (
        ("copy", "cp", "at most 1.5"),
        ("mergekit", "cp", "at most 1.5"),
        ("auto", "cp", "at most 1.5"),
        ("load half", "load whole", "at most 0.6"),
    ):
        median, fastest = (found[job][of] / found[to][of] for of in ("median", "fastest"))
        lines.append(f"| {job} / {to}, time | {median:.2f} | {fastest:.2f} | {promise} |")
    peak = found["load half"]["mb"] / found["load whole"]["mb"]
    lines.append(f"| load half / load whole, peak | {peak:.2f} | | at most 0.6 |")
    for job in ("copy", "auto"):
        lines.append(f"| {job}, peak above the start | {found[job]['mb']:.0f} MB | | at most {shard_mb + 200:.0f} MB |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the model")
    parser.add_argument("--turns", type=int, default=7, help="runs of each job, one after another in turns")
    parser.add_argument("--scratch", type=Path, help="where to write, on the file system to measure")
    parser.add_argument("--child", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.source, given.out)
        return
    from lmprune.models.checkpoint import Checkpoint
    from lmprune.writing.copying import copy_checkpoint

    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        source = Path(folder) / "model"
        for model, gib in ((source, given.gib), (source.with_name("small"), 0.001)):
            make_model(model, gib)
            copy_checkpoint(model, plan(), model.with_name(f"{model.name}-kept"))
        shard = max(file.stat().st_size for file in source.glob("*.safetensors")) / 2**20
        print(f"{Checkpoint.open(source).bytes / 2**30:.2f} GiB, largest shard {shard:.0f} MB, half of the layers kept")
        print(report(in_turns(source, given.turns), shard))


if __name__ == "__main__":
    main()
