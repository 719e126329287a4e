"""All healing methods on the demo model: at equal steps and at equal time, several seeds, as a table.

    python benchmarks/heal.py --out build/heal.jsonl --steps 200 --seconds 120 --seeds 0 1 2

Each line of the output file is one run, so that an interrupted benchmark goes on where it stopped. Run it on an idle
machine: the times, and through them the rows at equal time, depend on it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from lmprune.calibration import DataSettings
from lmprune.heal import HealSettings, heal
from lmprune.quiet import quiet_bars, quiet_hosts

METHODS: dict[str, dict[str, object]] = {
    "lora, ffn": {"method": "lora"},
    "lora, all projections": {"method": "lora", "targets": "all"},
    "qlora nf4, ffn": {"method": "qlora"},
    "last 3 layers": {"method": "last-layers"},
    "last 3 layers and lm_head": {"method": "last-layers", "head": "train"},
    "junction": {"method": "junction"},
    "full": {"method": "full"},
    "lora + distill": {"method": "lora+distill"},
    "full + distill": {"method": "full+distill"},
    "full + distill + aux": {"method": "full+distill", "aux": 1.0},
}


def run(recipe: Path, name: str, steps: int, seed: int) -> dict[str, object]:
    """One healing run; ``step_seconds`` includes its share of evaluations, merging and proof."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = HealSettings(**METHODS[name], steps=steps, seed=seed)  # type: ignore[arg-type]
        done = heal(None, Path(scratch) / "out", settings, DataSettings(data="demo"), recipe=recipe)
    return {
        "method": name,
        "seed": seed,
        "steps": steps,
        "original": done.original,
        "pruned": done.pruned,
        "healed": done.healed,
        "gap_closed": done.gap_closed,
        "seconds": done.seconds,
        "trained": done.trained_parameters,
    }


def table(rows: list[dict[str, object]]) -> str:
    """Mean and spread (largest minus smallest) over seeds."""
    lines = [
        "| method | trains | steps | seconds | held-out loss | gap closed | spread |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    groups: dict[tuple[object, object], list[dict[str, object]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["kind"]), []).append(row)
    for (name, kind), found in groups.items():
        gaps, losses, times = ([float(str(r[key])) for r in found] for key in ("gap_closed", "healed", "seconds"))
        steps = " to ".join(str(n) for n in sorted({int(str(r["steps"])) for r in found}))
        lines.append(
            f"| {name} ({kind}) | {found[0]['trained']:,} | {steps} | {statistics.mean(times):.0f} "
            f"| {statistics.mean(losses):.4f} | {statistics.mean(gaps):.1%} | {max(gaps) - min(gaps):.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", type=Path, required=True, help="made by: lmprune recipe demo --drop 3 -o demo.yml")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    quiet_hosts()
    quiet_bars()
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.is_file() else []

    def have(name: str, kind: str, seed: int) -> dict[str, object] | None:
        return next((r for r in rows if (r["method"], r["kind"], r["seed"]) == (name, kind, seed)), None)

    for seed in args.seeds:
        for name in METHODS:
            for kind in ("equal steps", "equal time"):
                if have(name, kind, seed):
                    continue
                steps = args.steps
                if kind == "equal time":
                    first = have(name, "equal steps", seed)
                    assert first is not None
                    steps = max(1, round(args.steps * args.seconds / float(str(first["seconds"]))))
                rows.append(run(args.recipe, name, steps, seed) | {"kind": kind})
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
