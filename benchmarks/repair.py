"""Repairs beside one another on the demo model: loss, facts, arithmetic and time of each, for several cuts.

    python -m benchmarks.repair [--fit-blocks N] [--layers 2-4 ...] [--methods refit ...] [--seeds S ...] [--limit N]
    python -m benchmarks.repair --memory      what a repair costs in memory and in passes, in memory and layer by layer

Run it with OMP_NUM_THREADS=1 for one thread. A block has 256 tokens. Loss is nats per token on text that nothing was
fitted on; facts and arithmetic are shares answered rightly in the demo's tasks; seconds are those of the whole command,
measuring and writing too. linear-patch:N is linear-patch, distilled for N steps; its maps are patches, as ghost's are,
and run in lmprune alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lmprune
from lmprune.cuts.plan import parse_layers
from lmprune.quiet import quiet_bars, quiet_hosts

TASKS = ("lmprune_demo_facts", "lmprune_demo_arithmetic")
LAYERS = 12
METHODS = ["scalar", "laco", "linear-patch", "linear-patch:100", "ghost", "replaceme", "streamline", "refit"]
WIDTH, INNER, DEPTH = 256, 4096, 6
"""Of the random Llama whose repair is weighed."""


def _shares(model: str, limit: int | None) -> str:
    found = lmprune.evaluate(model, TASKS, limit=limit)["results"]
    values = [next(v for k, v in found[task].items() if k.startswith(("acc", "exact_match"))) for task in TASKS]
    return " | ".join(f"{100 * value:.1f}" for value in values)


def table(options: argparse.Namespace) -> None:
    """Every method on every cut, for each seed."""
    print("| cut | seed | method | loss | gap closed | facts % | arithmetic % | seconds |\n" + 8 * "|---" + "|")
    with tempfile.TemporaryDirectory() as scratch:
        for layers in options.layers:
            recipe = Path(scratch) / f"{layers}.yml"
            lmprune.write_recipe("demo", lmprune.Plan(LAYERS, parse_layers(layers)), recipe)
            shares, told = _shares(str(recipe), options.limit), False
            for seed, method in [(seed, method) for seed in options.seeds for method in options.methods]:
                out, began = Path(scratch) / f"{layers} {method} {seed}", time.process_time()
                name, _, steps = method.partition(":")
                more = {"patch_steps": int(steps)} if steps else {}
                asked = lmprune.HealSettings(method=name, fit_blocks=options.fit_blocks, seed=seed, **more)
                try:
                    done = lmprune.heal(recipe, out, asked)
                except lmprune.LmpruneError as error:
                    print(f"| {layers} | {seed} | {method} | {error} | | | | |", flush=True)
                    continue
                seconds = time.process_time() - began
                if not told:
                    print(f"| {layers} | | none | {done.pruned:.4f} (whole {done.original:.4f}) | | {shares} | |")
                    told = True
                closed = f"{100 * done.gap_closed:.1f} %" if done.gap_closed is not None else ""
                row = f"{done.healed:.4f} | {closed} | {_shares(str(out), options.limit)} | {seconds:.0f}"
                print(f"| {layers} | {seed} | {method} | {row} |", flush=True)


# --- memory ---------------------------------------------------------------------------------------------------------


def weighed(folder: Path, way: str) -> None:
    """One repair in this process: its peak above where it started, in bytes, and its passes."""
    import numpy as np
    import torch

    from lmprune.healing.keeping import Kept
    from lmprune.healing.methods.refit import Refit
    from lmprune.healing.one_by_one import one_by_one
    from lmprune.healing.refitting import refit
    from lmprune.models.cut import open_cut

    torch.set_num_threads(1)
    rows = np.random.default_rng(0).integers(3, 1000, (32, 128)).astype(np.int32)
    for size in ("small", "large"):  # the first warms up
        base = open_cut(folder / size)
        plan = lmprune.Plan(base.layers, (2, 3))
        cut = base.without(plan, "cut")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        before = _status("VmRSS")
        if way == "streamed":
            kept = Kept(folder / f"solved-{size}")
            report = refit(one_by_one(cut, "cpu"), one_by_one(base, "cpu"), plan, rows, Refit(), kept=kept)
        else:
            report = refit(cut.load(dtype="float32"), base.load(dtype="float32"), plan, rows, Refit())
    print(json.dumps({"peak": _status("VmHWM") - before, "passes": report.passes, "tokens": report.tokens}))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def memory() -> None:
    """Both ways, beside the sizes of a layer, of a Gram matrix and of all states of the text."""
    import transformers

    with tempfile.TemporaryDirectory() as scratch:
        for size, width, inner, depth in (("small", 32, 48, 5), ("large", WIDTH, INNER, DEPTH)):
            config = transformers.LlamaConfig(
                hidden_size=width, intermediate_size=inner, num_hidden_layers=depth, num_attention_heads=4,
                num_key_value_heads=4, vocab_size=1000,
            )  # fmt: skip
            transformers.LlamaForCausalLM(config).save_pretrained(Path(scratch) / size)
        layer = 4 * (4 * WIDTH**2 + 3 * WIDTH * INNER)
        print("| way | peak (MB) | of it a layer | a Gram matrix of its down_proj | states of the text | passes |")
        print("|---|---|---|---|---|---|")
        for way in ("streamed", "in memory"):
            run = [sys.executable, "-m", "benchmarks.repair", "--weigh", scratch, way]
            found = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            sizes = [found["peak"], layer, 8 * INNER**2, 4 * WIDTH * found["tokens"]]
            print("|".join(["", f" {way} ", *(f" {size / 1e6:.1f} " for size in sizes), f" {found['passes']} ", ""]))


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit-blocks", type=int, default=64)
    parser.add_argument("--layers", nargs="+", default=["2-4", "4,7,9", "4,6,7"])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--weigh", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet_hosts(), quiet_bars()
    if options.weigh:
        weighed(Path(options.weigh[0]), options.weigh[1])
    elif options.memory:
        memory()
    else:
        table(options)


if __name__ == "__main__":
    main()
