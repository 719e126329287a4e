"""Repairs beside one another on the demo model: loss, facts, arithmetic and time of each, for several cuts.

    python -m benchmarks.repair [--fit-blocks N] [--layers 2-4 ...] [--methods refit ...] [--seed S] [--limit N]

Run it with OMP_NUM_THREADS=1 for one thread. A block has 256 tokens. Loss is nats per token on text that nothing was
fitted on; facts and arithmetic are shares answered rightly in the demo's tasks; seconds are those of the whole command,
measuring and writing too. linear-patch:N is linear-patch, distilled for N steps; its maps are patches, as ghost's are,
and run in lmprune alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import lmprune
from lmprune.cuts.plan import parse_layers
from lmprune.quiet import quiet_bars, quiet_hosts

TASKS = ("lmprune_demo_facts", "lmprune_demo_arithmetic")
LAYERS = 12


def _shares(model: str, limit: int | None) -> str:
    found = lmprune.evaluate(model, TASKS, limit=limit)["results"]
    values = [next(v for k, v in found[task].items() if k.startswith(("acc", "exact_match"))) for task in TASKS]
    return " | ".join(f"{100 * value:.1f}" for value in values)


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit-blocks", type=int, default=64)
    parser.add_argument("--layers", nargs="+", default=["2-4", "4,7,9", "4,6,7"])
    parser.add_argument(
        "--methods", nargs="+", default=["scalar", "linear-patch", "linear-patch:100", "ghost", "replaceme", "refit"]
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    quiet_hosts(), quiet_bars()
    print("| cut | method | loss | gap closed | facts % | arithmetic % | seconds |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for layers in options.layers:
            recipe = Path(scratch) / f"{layers}.yml"
            lmprune.write_recipe("demo", lmprune.Plan(LAYERS, parse_layers(layers)), recipe)
            shares, told = _shares(str(recipe), options.limit), False
            for method in options.methods:
                out, began = Path(scratch) / f"{layers} {method}", time.monotonic()
                name, _, steps = method.partition(":")
                more = {"patch_steps": int(steps)} if steps else {}
                asked = lmprune.HealSettings(method=name, fit_blocks=options.fit_blocks, seed=options.seed, **more)
                try:
                    done = lmprune.heal(recipe, out, asked)
                except lmprune.LmpruneError as error:
                    print(f"| {layers} | {method} | {error} | | | | |", flush=True)
                    continue
                seconds = time.monotonic() - began
                if not told:
                    print(f"| {layers} | none | {done.pruned:.4f} (whole {done.original:.4f}) | | {shares} | |")
                    told = True
                closed = f"{100 * done.gap_closed:.1f} %" if done.gap_closed is not None else ""
                after = _shares(str(out), options.limit)
                print(f"| {layers} | {method} | {done.healed:.4f} | {closed} | {after} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
