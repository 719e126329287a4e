"""Repairs beside one another on the demo model: loss, facts, arithmetic and time of each, for several cuts.

    python -m benchmarks.repair [--fit-blocks N] [--layers 2-4 ...] [--methods refit ...] [--seeds S ...] [--write]
    python -m benchmarks.repair --memory      what a repair costs in memory and in passes, in memory and layer by layer

Run it with OMP_NUM_THREADS=1 for one thread. A block has 256 tokens. Loss is nats per token on text that nothing was
fitted on; facts and arithmetic are shares answered rightly in the demo's tasks; seconds are those of the whole command,
measuring and writing too. METHOD:VALUE gives a method's own option of `OWN` a value, as linear-patch:20, distilled for
20 steps; maps of linear-patch and ghost are patches, which run in lmprune alone. --write keeps the table as
benchmarks/results/repair-demo.csv.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lmprune
from benchmarks import tables
from lmprune.cuts.plan import parse_layers
from lmprune.quiet import quiet_bars, quiet_hosts

TASKS = ("lmprune_demo_facts", "lmprune_demo_arithmetic")
LAYERS = 12
METHODS = ["scalar", "laco", "laco:code", "linear-patch", "linear-patch:20", "ghost", "replaceme", "streamline"]
METHODS += ["refit:states", "refit"]
OWN = {"linear-patch": "patch_steps", "laco": "merge_rule", "refit": "last_for"}
COLUMNS = {
    "cut": ["gone", ""],
    "method": ["method", ""],
    "loss": ["loss", ".4f"],
    "closed": ["gap closed", ".1%"],
    "facts": ["facts", ".1%"],
    "arithmetic": ["arithmetic", ".1%"],
    "seconds": ["seconds", ".0f"],
}
WIDTH, INNER, DEPTH = 256, 4096, 6
"""Of the random Llama whose repair is weighed."""


def _scores(model: str, limit: int | None) -> dict[str, float]:
    found = lmprune.evaluate(model, TASKS, limit=limit)["results"]
    values = [next(v for k, v in found[task].items() if k.startswith(("acc", "exact_match"))) for task in TASKS]
    return dict(zip(("facts", "arithmetic"), values))


def table(options: argparse.Namespace) -> None:
    """Every method on every cut, for each seed."""
    rows: list[dict[str, Any]] = []

    def add(**row: Any) -> None:
        rows.append({name: row.get(name) for name in (*COLUMNS, "seed")})
        print(json.dumps(rows[-1]), flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        for layers in options.layers:
            recipe, first = Path(scratch) / f"{layers}.yml", len(rows)
            lmprune.write_recipe("demo", lmprune.Plan(LAYERS, parse_layers(layers)), recipe)
            add(cut=layers, method="none", **_scores(str(recipe), options.limit))
            for seed, method in [(seed, method) for seed in options.seeds for method in options.methods]:
                out, began = Path(scratch) / f"{layers} {method} {seed}", time.process_time()
                name, _, value = method.partition(":")
                own = {OWN[name]: int(value) if value.isdigit() else value} if value else {}
                asked = lmprune.HealSettings(method=name, fit_blocks=options.fit_blocks, seed=seed, **own)
                try:
                    done = lmprune.heal(recipe, out, asked)
                except lmprune.LmpruneError as error:
                    lost = re.search(r"loss [\d.]+ before, ([\d.]+) after", str(error))
                    said = {"loss": float(lost[1])} if lost else {}
                    add(cut=layers, method=f"{method}, {'not written' if lost else error}", seed=seed, **said)
                    continue
                seconds = time.process_time() - began
                rows[first]["loss"], whole = done.pruned, done.original
                scores = _scores(str(out), options.limit)
                add(
                    cut=layers,
                    method=method,
                    seed=seed,
                    loss=done.healed,
                    closed=done.gap_closed,
                    seconds=seconds,
                    **scores,
                )
    seeds = " ".join(map(str, options.seeds))
    command = f"python -m benchmarks.repair --fit-blocks {options.fit_blocks} --layers {' '.join(options.layers)}"
    command += f" --methods {' '.join(options.methods)} --seeds {seeds}"
    note = f"{options.fit_blocks} blocks of 256 tokens; the whole model's loss is {whole:.4f}. Processor seconds."
    shown = COLUMNS if len(options.seeds) == 1 else {**COLUMNS, "seed": ["seed", "d"]}
    if options.write:
        tables.write("repair-demo", rows, shown, command=command, note=note)
    else:
        print(command, note, sep="\n")


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
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results")
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
