"""Speed and memory of pruning and of partial loading, as ratios measured side by side in one run.

    python -m benchmarks.prune [--gib 1.0] [--repeat 3] [--scratch DIR]

Makes a random bf16 Llama, keeps every second layer, and measures, each in a fresh process after its imports:
copying the kept bytes with cp, our writer, mergekit on a repaired base folder, and loading whole and half.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAYERS = 16


def make_model(folder: Path, gib: float) -> None:
    """A random bf16 Llama of at least that size, in shards of a quarter of it."""
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
    from lmprune.plan import LayerPlan

    return LayerPlan.from_kept(LAYERS, range(0, LAYERS, 2))


def prepare_cp(source: Path, out: Path) -> Callable[[], Any]:
    kept = source.parent / "kept"
    return lambda: subprocess.run(["cp", "-r", str(kept), str(out)], check=True)


def prepare_prune(source: Path, out: Path) -> Callable[[], Any]:
    from lmprune.copying import copy_checkpoint
    from lmprune.models import loading  # noqa: F401  (imported before the clock starts)

    return lambda: copy_checkpoint(source, plan(), out)


def prepare_mergekit(source: Path, out: Path) -> Callable[[], Any]:
    import mergekit.merge  # noqa: F401

    from lmprune.base_folder import write_base_folder
    from lmprune.merge import run_mergekit
    from lmprune.models.checkpoint import read_config
    from lmprune.models.fields import apply_fields, changed_fields
    from lmprune.models.loading import load_config

    base = out.with_name("base")
    config = apply_fields(read_config(source), changed_fields(load_config(source).to_dict(), plan().kept))
    write_base_folder(source, config, base)
    slices = [{"sources": [{"model": str(source), "layer_range": list(piece)}]} for piece in plan().slices()]
    merge = {"merge_method": "passthrough", "slices": slices, "base_model": str(base)}
    return lambda: run_mergekit(merge, out, shard_bytes=2**28)


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
    "prune": prepare_prune,
    "mergekit": prepare_mergekit,
    "load whole": prepare_whole,
    "load half": prepare_half,
}


def child(job: str, source: Path, out: Path) -> None:
    """Run one job and print its seconds and the peak memory above where it started, in MB."""
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


def measure(job: str, source: Path, scratch: Path, repeat: int) -> dict[str, float]:
    """The fastest of several runs of one job."""
    runs = []
    for _ in range(repeat):
        out = scratch / "out"
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.prune", "--child", job, "--source", str(source), "--out", str(out)],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(scratch / "base", ignore_errors=True)
    return min(runs, key=lambda run: run["seconds"])


def report(found: dict[str, dict[str, float]], shard_mb: float) -> str:
    """The table and the ratios that are promised."""
    lines = [f"{'job':<12}{'seconds':>10}{'peak MB':>10}"]
    lines += [f"{job:<12}{run['seconds']:>10.2f}{run['mb']:>10.0f}" for job, run in found.items()]
    cp, whole, half = found["cp"], found["load whole"], found["load half"]
    lines += [
        f"prune / cp of the kept bytes: {found['prune']['seconds'] / cp['seconds']:.2f} (promised: at most 1.5)",
        f"mergekit / cp of the kept bytes: {found['mergekit']['seconds'] / cp['seconds']:.2f}",
        f"prune, peak above baseline: {found['prune']['mb']:.0f} MB (promised: at most {shard_mb + 200:.0f})",
        f"half / whole, time to load: {half['seconds'] / whole['seconds']:.2f} (promised: at most 0.6)",
        f"half / whole, peak to load: {half['mb'] / whole['mb']:.2f} (promised: at most 0.6)",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the model")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each job; the fastest counts")
    parser.add_argument("--scratch", type=Path, help="where to write, on the file system to measure")
    parser.add_argument("--child", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.source, given.out)
        return
    from lmprune.copying import copy_checkpoint
    from lmprune.models.checkpoint import Checkpoint

    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        source = Path(folder) / "model"
        make_model(source, given.gib)
        copy_checkpoint(source, plan(), source.parent / "kept")
        shard = max(file.stat().st_size for file in source.glob("*.safetensors")) / 2**20
        print(f"{Checkpoint.open(source).bytes / 2**30:.2f} GiB, largest shard {shard:.0f} MB, half of the layers kept")
        found = {job: measure(job, source, Path(folder), given.repeat) for job in JOBS}
        print(report(found, shard))


if __name__ == "__main__":
    main()
