"""Width and depth under a budget, measured: what the search finds, what it takes, and what others leave.

    python -m benchmarks.budget demo --out DIR                   the demo at 75 and 50 %, depth alone, and optipfair
    python -m benchmarks.budget gemma MODEL --out DIR            FFN and depth at 90, 80 and 70 % of Gemma 3 270M
    python -m benchmarks.budget score RECIPE... --out DIR        any recipes, refitted: loss, tasks, size and speed

Each row is written as it comes and is not made again. Nothing trains. Times are processor seconds; run with
OMP_NUM_THREADS=1. optipfair runs in an environment of its own: ``--optipfair PYTHON`` names its interpreter.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TASKS = ("lmprune_demo_facts", "lmprune_demo_arithmetic")
SEARCH = ("--loss-samples", "32", "--fit-tokens", "6000")
OPTIPFAIR = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from optipfair import prune_model
source, out, kind, amount = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source)
if kind == "width":
    pruned = prune_model(model, pruning_type="MLP_GLU", neuron_selection_method="MAW",
                         pruning_percentage=float(amount), show_progress=False)
else:
    pruned = prune_model(model, pruning_type="DEPTH", num_layers_to_remove=int(amount), show_progress=False)
pruned = pruned[0] if isinstance(pruned, tuple) else pruned
pruned.save_pretrained(out)
AutoTokenizer.from_pretrained(source).save_pretrained(out)
"""


# --- rows -----------------------------------------------------------------------------------------------------------


class Rows:
    """The rows of a run, by name, in ``rows.jsonl`` of its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._file = folder, folder / "rows.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.is_file() else []
        self._found = {row["name"]: row for row in map(json.loads, lines)}

    def has(self, name: str) -> bool:
        """Whether it is made already."""
        return name in self._found

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Keep a row."""
        self._found[name] = {"name": name} | row
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._found[name]) + "\n")
        print(json.dumps(self._found[name]), flush=True)

    def table(self) -> Iterator[str]:
        """As Markdown."""
        yield "| model | what is left | parameters | speed | as cut | refitted | facts | arithmetic |"
        yield "|---|---|--:|--:|--:|--:|--:|--:|"
        for row in self._found.values():
            if "why" in row:
                yield f"| {row['name']} | {row['why']} | | | | | | |"
                continue
            shares = [f"{row[key]:.1%}" if key in row else "" for key in ("facts", "arithmetic")]
            yield (
                f"| {row['name']} | {row['left']} | {row['parameters']:.1%} | {row['speed']:.2f}x | {row['cut']:+.4f} "
                f"| {row['refitted']:+.4f} | {shares[0]} | {shares[1]} |"
            )


def seconds() -> float:
    """Processor seconds of this process and its children."""
    every = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in every)


# --- scoring --------------------------------------------------------------------------------------------------------


def score(recipe: Path, folder: Path, *, blocks: int, data: str, tasks: bool) -> dict[str, Any]:
    """Refit the cut of ``recipe``; what it lost on unseen text and in tasks, its size and its speed."""
    from lmprune.healing import HealSettings, heal
    from lmprune.healing.run import HealResult
    from lmprune.models.cut import Cut, open_cut
    from lmprune.text.sources import DataSettings

    cut, began = open_cut(recipe), seconds()
    settings = HealSettings(method="refit", fit_blocks=blocks, device="cpu", dtype="float32")
    done = HealResult.read(folder) if folder.is_dir() else heal(recipe, folder, settings, DataSettings(data=data))
    took = seconds() - began
    assert cut.plan is not None and done.original is not None, "a recipe has a plan, and its base is here"
    row = {
        "left": cut.plan.describe(),
        "cut": done.pruned - done.original,
        "refitted": done.healed - done.original,
        "refit_seconds": round(took, 1),
    }
    return row | size_and_speed(str(folder), Cut(cut.base)) | (accuracies(str(folder)) if tasks else {})


def size_and_speed(model: str, base: Any) -> dict[str, Any]:
    """The share of the parameters without embeddings, and times as fast."""
    from lmprune.benching.measuring import times_as_fast
    from lmprune.models.cut import open_cut

    live, whole = open_cut(model).load(dtype="float32"), base.load(dtype="float32")

    def inner(model: Any) -> int:
        ends = {id(end.weight): end.weight.numel() for end in (model.get_input_embeddings(),
                model.get_output_embeddings())}  # fmt: skip
        return sum(parameter.numel() for parameter in model.parameters()) - sum(ends.values())

    return {"parameters": inner(live) / inner(whole), "speed": times_as_fast(live, whole)}


def accuracies(model: str) -> dict[str, float]:
    """Of both tasks of the demo, by the harness, on the written model with its own back end."""
    from lmprune.evaluation.harness import evaluate

    found = evaluate({"pretrained": model}, TASKS, batch_size=50)["results"]
    return {
        "facts": found["lmprune_demo_facts"]["acc,none"],
        "arithmetic": found["lmprune_demo_arithmetic"]["exact_match,answer"],
    }


# --- the runs -------------------------------------------------------------------------------------------------------


def searched(rows: Rows, model: str, name: str, *words: str, blocks: int, data: str, tasks: bool) -> None:
    """Search for a recipe, then score it."""
    recipe = rows.folder / f"{name.replace(' ', '-').replace('%', '')}.yml"
    if rows.has(name):
        return
    began = seconds()
    if not recipe.is_file():
        subprocess.run(["lmprune", "recipe", model, "-o", str(recipe), *words], check=True)
    took, notes = seconds() - began, recipe_notes(recipe)
    rows.add(name, score(recipe, recipe.with_suffix(""), blocks=blocks, data=data, tasks=tasks)
             | {"search_seconds": round(took, 1)} | notes)  # fmt: skip


def recipe_notes(recipe: Path) -> dict[str, Any]:
    """What the recipe says of the search."""
    from lmprune.cuts.recipe import Recipe

    choice = Recipe.read(recipe).choice
    return {key: choice[key] for key in ("trials", "passes", "gave") if key in choice}


def optipfair(rows: Rows, python: str | None, kind: str, amount: str, tasks: bool) -> None:
    """What optipfair leaves of the demo: by default, without a refit, which it has none of."""
    name = f"optipfair 0.4.2, {kind} {amount}"
    if rows.has(name):
        return
    if python is None:
        rows.add(name, {"why": "not installed here: give --optipfair PYTHON"})
        return
    from lmprune.forward.loss import held_out_loss
    from lmprune.models.cut import open_cut
    from lmprune.text.blocks import read_held_out
    from lmprune.text.sources import DataSettings

    base, out = open_cut("demo"), rows.folder / f"optipfair-{kind}-{amount}"
    done = subprocess.run([python, "-c", OPTIPFAIR, str(base.base.path), str(out), kind, amount],
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        rows.add(name, {"why": done.stderr.strip().splitlines()[-1]})
        return
    blocks = read_held_out(DataSettings(), base.tokenizer(), blocks=64, length=256, default="demo").blocks
    losses = [held_out_loss(cut.load(dtype="float32"), blocks, batch=16) for cut in (open_cut(str(out)), base)]
    row = {"left": f"{kind} {amount}", "cut": losses[0] - losses[1], "refitted": losses[0] - losses[1]}
    rows.add(name, row | size_and_speed(str(out), base) | (accuracies(str(out)) if tasks else {}))


def demo(args: argparse.Namespace) -> None:
    """The demo at 75 and 50 %."""
    rows = Rows(args.out)
    how: dict[str, Any] = {"blocks": args.blocks, "data": "demo", "tasks": True}
    for share in ("0.75", "0.5"):
        searched(rows, "demo", f"search {share}", "--params", share, *SEARCH, **how)
    searched(rows, "demo", "depth 0.75", "--criterion", "best", "--drop", "3", "--loss-samples", "32", **how)
    searched(rows, "demo", "depth 0.5", "--criterion", "best", "--drop", "6", "--loss-samples", "32", **how)
    searched(rows, "demo", "FFN 0.75", "--params", "0.75", "--with", "ffn", *SEARCH, **how)
    searched(rows, "demo", "FFN 0.75, optipfair's score", "--params", "0.75", "--with", "ffn", "--neurons",
             "peak-to-peak", *SEARCH, **how)  # fmt: skip
    for kind, amount in (("width", "35"), ("depth", "3")):
        optipfair(rows, args.optipfair, kind, amount, tasks=True)
    print("\n".join(rows.table()))


def gemma(args: argparse.Namespace) -> None:
    """FFN and depth at three sizes."""
    rows = Rows(args.out)
    for share in args.shares:
        searched(rows, args.model, f"search {share}", "--params", share, "--with", "depth,ffn", "--data", args.data,
                 *args.search, blocks=args.blocks, data=args.data, tasks=False)  # fmt: skip
    print("\n".join(rows.table()))


def scores(args: argparse.Namespace) -> None:
    """Any recipes."""
    rows = Rows(args.out)
    for recipe in args.recipe:
        if not rows.has(recipe.stem):
            began = time.process_time()
            row = score(recipe, args.out / recipe.stem, blocks=args.blocks, data=args.data, tasks=args.data == "demo")
            rows.add(recipe.stem, row | {"seconds": round(time.process_time() - began, 1)} | recipe_notes(recipe))
    print("\n".join(rows.table()))


def main() -> None:
    """Choose a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, work in (("demo", demo), ("gemma", gemma), ("score", scores)):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--blocks", type=int, default=64, help="blocks of 256 tokens of the final refit")
        command.set_defaults(work=work)
        if name == "demo":
            command.add_argument("--optipfair", metavar="PYTHON")
        if name == "gemma":
            command.add_argument("model")
            command.add_argument("--shares", nargs="+", default=["0.9", "0.8", "0.7"])
            command.add_argument("--search", nargs="*", default=["--loss-samples", "16", "--fit-tokens", "9000"])
        if name == "score":
            command.add_argument("recipe", type=Path, nargs="+")
        if name != "demo":
            command.add_argument("--data", default="demo" if name == "score" else None, required=name == "gemma")
    args = parser.parse_args()
    from lmprune.quiet import quiet_bars, quiet_hosts

    quiet_hosts()
    quiet_bars()
    args.work(args)


if __name__ == "__main__":
    main()
