"""What commands measured, as the small files that README and docs show.

    lmprune demo --json > walk.json && python -m benchmarks.tables walk walk.json
    lmprune sweep demo -o RUN ... && python -m benchmarks.tables sweep RUN --command "lmprune sweep demo -o RUN ..."

Writes ``benchmarks/results/NAME.csv`` and beside it ``NAME.json``: the command, the date, versions, a note, and how
each column is shown. Then `python scripts/figures.py` renders what is made of them.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
WALK = {
    "model": ["model", ""],
    "layers": ["layers", "d"],
    "parameters": ["parameters", ",d"],
    "bits_per_byte": ["bits per byte", ".3f"],
    "facts": ["facts", ".1%"],
    "arithmetic": ["arithmetic", ".1%"],
    "tokens_per_second": ["tokens/s", ",.0f"],
}
SWEEP = {
    "curve": ["chosen by", ""],
    "gone": ["gone", ""],
    "parameters": ["parameters left", ".0%"],
    "facts": ["facts", ".1%"],
    "arithmetic": ["arithmetic", ".1%"],
    "bits_per_byte": ["bits per byte", ".3f"],
    "same": ["says the same", ".1%"],
}


def write(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, Sequence[str]],
    *,
    command: str,
    note: str = "",
    more: Mapping[str, Any] | None = None,
    folder: Path = RESULTS,
) -> None:
    """Write ``NAME.csv`` with the keys of ``columns``, None as nothing, and ``NAME.json``, ``more`` in it."""
    from lmprune.versions import versions

    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        out = csv.DictWriter(file, [*columns], extrasaction="ignore", lineterminator="\n")
        out.writeheader()
        out.writerows(rows)
    told = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "note": note,
        "columns": columns,
        **(more or {}),
    }
    (folder / f"{name}.json").write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def walk_rows(walk: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of ``lmprune demo --json``, scores beside the rest."""
    values = [{name: score["value"] for name, score in row["scores"].items()} for row in walk["rows"]]
    return [{**row, **scores} for row, scores in zip(walk["rows"], values)]


def sweep_rows(folder: Path) -> list[dict[str, Any]]:
    """The points of a sweep of the demo, with the share of the parameters that each leaves."""
    from lmprune.models.cut import open_cut
    from lmprune.reporting.collect import Collected
    from lmprune.sweeping.folder import recipe_path
    from lmprune.sweeping.points import BASELINE

    run = Collected.read(folder).alike()
    whole = open_cut("demo").load().num_parameters()
    points = [("nothing", run.point(BASELINE))]
    points += [(curve, point) for curve, found in run.curves().items() for point in found]
    rows = []
    for curve, point in points:
        scores, agreed = run.results[point.name].scores, run.agreed(point)
        left = open_cut(recipe_path(folder, point)).load().num_parameters() if point.is_cut else whole
        rows.append(
            {
                "curve": curve,
                "gone": point.what,
                "parameters": round(left / whole, 4),
                "facts": round(scores["lmprune_demo_facts"].value, 4),
                "arithmetic": round(scores["lmprune_demo_arithmetic"].value, 4),
                "bits_per_byte": round(scores["lmprune_demo_loss"].value, 4),
                "same": round(agreed.same, 4) if agreed is not None else None,
            }
        )
    return rows


def main() -> None:
    """Read what a command left, and write its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("walk", "sweep"))
    parser.add_argument("source", type=Path)
    parser.add_argument("--command", default="lmprune demo")
    parser.add_argument("--note", default="")
    parser.add_argument("--name")
    asked = parser.parse_args()
    if asked.kind == "walk":
        rows, columns = walk_rows(json.loads(asked.source.read_text(encoding="utf-8"))), WALK
    else:
        rows, columns = sweep_rows(asked.source), SWEEP
    write(asked.name or f"demo-{asked.kind}", rows, columns, command=asked.command, note=asked.note)


if __name__ == "__main__":
    main()
