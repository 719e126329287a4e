"""What others choose, leave and take: the same model, states, tokens and held-out text as ours, in one run.

    python -m benchmarks.peers demo [--drop 3]
    python -m benchmarks.peers MODEL --text FILE.txt [--drop N] [--name NAME]

Packages run where they install (`pip install --target`, apart from lmprune's own environment): short-transformers
1.0.0 and optipfair 0.4.2; of the others a row says that it is our rendering of what their code or paper does. All see
the same samples, joined and cut to one length, as PruneMe's loop needs. Seconds are the processor's, without loading; a
ratio is to lmprune's row for the same job, the first of its kind. Loss and agreement are of what is left, as in
`benchmarks.scoreboard`, of whose options this takes those that it reads. Rows are kept and made once. Run it with
OMP_NUM_THREADS=1. Writes NAME.csv, NAME.md and NAME.json to benchmarks/results.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from benchmarks.choice import naive_greedy
from benchmarks.profile import pruneme, short_transformers, short_transformers_pass
from benchmarks.scoreboard import Board, Wanted, caption, described, parameters, parser
from lmprune.benching.measuring import times_as_fast
from lmprune.choosing import ModelEvidence, write_recipe
from lmprune.criteria import block_influence, greedy, one_shot
from lmprune.criteria.settings import ChoiceSettings
from lmprune.cuts.plan import Plan
from lmprune.errors import LmpruneError, UsageError, line_of
from lmprune.files import write_json, write_text
from lmprune.forward.agreement import Mean
from lmprune.forward.batches import Batch, batches_of
from lmprune.forward.views import pruned_view
from lmprune.healing import HealSettings, heal
from lmprune.models.cut import open_cut
from lmprune.models.loading import load_model
from lmprune.models.stack import find_stack
from lmprune.profiling import ProfileSettings, profile
from lmprune.quiet import quiet_bars, quiet_hosts
from lmprune.writing.pruning import prune

PACKAGES = {"short-transformers": "1.0.0", "optipfair": "0.4.2"}
OPTIPFAIR = """
import json, sys, time
import numpy, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from optipfair import prune_model
from optipfair.pruning.depth import analyze_layer_importance
source, out, kind, amount, text = sys.argv[1:]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
rows = [] if text == "-" else torch.from_numpy(numpy.load(text)).long()
batches = [{"input_ids": rows[at:at + 4], "attention_mask": torch.ones_like(rows[at:at + 4])}
           for at in range(0, len(rows), 4)]
began = time.process_time()
if kind == "width":
    pruned = prune_model(model, pruning_type="MLP_GLU", neuron_selection_method="MAW",
                         pruning_percentage=float(amount), dataloader=batches or None, show_progress=False)
elif batches:
    scores = analyze_layer_importance(model, batches, show_progress=False)
    gone = sorted(sorted(scores, key=scores.get)[:int(amount)])
    pruned = prune_model(model, pruning_type="DEPTH", layer_indices=gone, layer_selection_method="custom",
                         show_progress=False)
else:
    pruned = prune_model(model, pruning_type="DEPTH", num_layers_to_remove=int(amount), show_progress=False)
took = time.process_time() - began
pruned = pruned[0] if isinstance(pruned, tuple) else pruned
pruned.save_pretrained(out)
AutoTokenizer.from_pretrained(source).save_pretrained(out)
print(json.dumps([took, gone if kind == "depth" and batches else None]))
"""
UNREAD = (
    "budget", "criteria", "draws", "refit", "healed", "heal", "kinds", "objective", "tasks", "limit", "fit-tokens",
    "share", "keep-checkpoints",
)  # fmt: skip
"""Options of a scoreboard that change nothing here, and so are not offered."""
COLUMNS = {
    "kind": ["job", ""], "by": ["who", ""], "how": ["how", ""], "gone": ["gone", ""], "rise": ["loss rises by", "+.4f"],
    "agreement": ["says the same", ".1%"], "seconds": ["seconds", ".2f"], "ratio": ["times as long as lmprune", ".2f"],
    "parameters": ["parameters left", ".1%"], "speed": ["times as fast", ".2f"],
}  # fmt: skip
RENDERED, OWN_PACKAGE = "our rendering", "their package"
Timed = tuple[Any, float]


class Peers:
    """The rows of one model: jobs, each with lmprune's way first."""

    def __init__(self, board: Board) -> None:
        self.board, self.args = board, board.args
        if len(board.drops) > 1:
            raise UsageError(f"--drop {self.args.drop}: give one number of layers")
        (self.drop,) = board.drops
        self.cut, self.folder = board.cut, board.folder
        self.layers = self.cut.layers
        samples = self.args.samples
        self.tokens = board.read(held_out=False, samples=samples)
        self.text = [np.asarray(row, np.int32) for row in self.tokens.rows]
        self.batch = 4
        self._speeds: dict[int, float] = {}

    @property
    def live(self) -> Any:
        """The whole model."""
        return self.board.live

    # --- the jobs ---------------------------------------------------------------------------------------------------

    def ways(self) -> Iterator[tuple[str, str, str, Callable[[], dict[str, Any]]]]:
        """Job, who, how, and what makes the row."""
        block, influence = "distances: a block", "influence: single layers"
        yield block, "lmprune, every size at once", "", self._ours_block
        yield block, "PruneMe, one size", f"{RENDERED}; 4-bit loading off", self._pruneme
        yield block, "short-transformers 1.0.0, last token", OWN_PACKAGE, self._short_transformers
        yield influence, "lmprune", "", self._ours_influence
        yield influence, "ShortGPT", RENDERED, self._shortgpt
        yield "greedy by loss", "lmprune", "", partial(self._greedy, exact=False)
        yield "greedy by loss", "lmprune, --exact", "", partial(self._greedy, exact=True)
        yield "greedy by loss", "SLEB", f"{RENDERED}; no barriers", self._sleb
        yield "writing", "lmprune prune", "with its proof", self._prune
        yield "writing", "mergekit alone", OWN_PACKAGE, self._mergekit
        share = round(100 * self.drop / self.layers)
        yield "all of it", "lmprune, one-shot and refit", "", self._both
        yield "all of it", "optipfair 0.4.2, depth", OWN_PACKAGE, partial(self._optipfair, "depth", str(self.drop))
        yield "all of it", "optipfair 0.4.2, width", OWN_PACKAGE, partial(self._optipfair, "width", str(self._neurons))
        for name, who in (("refit", "lmprune refit"), ("replaceme", "ReplaceMe"), ("linear-patch", "LinearPatch")):
            how = "" if name == "refit" else f"{RENDERED} of the formula (lmprune heal --method {name})"
            yield f"repair of the {share} % by distance", who, how, partial(self._repair, name)

    @property
    def _neurons(self) -> int:
        """Per cent of the neurons whose loss leaves as many parameters as the layers do."""
        layer = find_stack(self.live).layers[0]
        every = sum(parameter.numel() for parameter in layer.parameters())
        mlp = sum(p.numel() for name, p in layer.named_parameters() if "mlp" in name)
        return round(100 * self.drop / self.layers * every / mlp)

    def _profile(self, token: Literal["last", "all"] = "last") -> Any:
        settings = ProfileSettings(batch_size=self.batch, max_length=self.args.max_length, token=token)
        return profile(self.live, self.text, settings)

    def _timed(self, work: Callable[[], Any]) -> Timed:
        """The fastest of some turns."""
        return min((timed(work) for _ in range(self.args.turns)), key=lambda found: found[1])

    def _ours_block(self) -> dict[str, Any]:
        found, seconds = self._timed(self._profile)
        start = found.best_block(self.drop)
        return self._of(Plan(self.layers, tuple(range(start, start + self.drop))), seconds)

    def _pruneme(self) -> dict[str, Any]:
        found, seconds = self._timed(lambda: pruneme(self.live, self.text, self.batch, "cpu", self.drop))
        # Their states begin behind the first layer: the block after state i is i + 1 .. i + n.
        start = min(found, key=lambda at: float(np.mean(found[at]))) + 1
        return self._of(Plan(self.layers, tuple(range(start, start + self.drop))), seconds)

    def _short_transformers(self) -> dict[str, Any]:
        why = installed("short-transformers", self.folder.parent, "seaborn")
        if why is not None:
            return {"why": why}
        watched = short_transformers(self.live, "last_token")
        _, seconds = self._timed(lambda: short_transformers_pass(watched, self.text, "cpu"))
        row = np.asarray(watched.memory.result)[self.drop - 1, : self.layers - self.drop + 1]
        start = int(row.argmin())
        return self._of(Plan(self.layers, tuple(range(start, start + self.drop))), seconds)

    def _ours_influence(self) -> dict[str, Any]:
        def work() -> Plan:
            return block_influence.choose(self.drop, ModelEvidence(self.cut, known=self._profile("all"))).plan

        return self._of(*self._timed(work))

    def _shortgpt(self) -> dict[str, Any]:
        """1 - mean cosine of every layer's input and output, over all tokens; the last layer's before the norm."""
        sums = np.zeros(self.layers)

        def work() -> None:
            states: list[Any] = []
            layers = find_stack(self.live).layers

            def after(_: Any, given: Any, out: Any) -> None:
                states.append(out[0] if isinstance(out, tuple) else out)

            hooks = [layers[0].register_forward_pre_hook(lambda _, given: states.append(given[0]))]
            hooks += [layer.register_forward_hook(after) for layer in layers]
            with torch.no_grad():
                for numbers in batches_of([len(row) for row in self.text], self.batch):
                    states.clear()
                    self.live(input_ids=Batch.of([self.text[i] for i in numbers], torch.device("cpu")).ids)
                    for at, (a, b) in enumerate(zip(states, states[1:])):
                        cosine = torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1)
                        sums[at] += float((1 - cosine).sum())
            for hook in hooks:
                hook.remove()

        _, seconds = timed(work)
        return self._of(
            Plan(self.layers, tuple(sorted(np.argsort(sums, kind="stable")[: self.drop].tolist()))), seconds
        )

    def _greedy(self, *, exact: bool) -> dict[str, Any]:
        def work() -> Plan:
            evidence = self.board.evidence.fresh()
            evidence.how = ChoiceSettings(exact=exact, loss_samples=self.args.samples)
            return greedy.choose(self.drop, evidence.by("loss")).plan

        self.board.evidence.prepare()
        return self._of(*self._timed(work))

    def _sleb(self) -> dict[str, Any]:
        text = self.board.evidence.text
        found, seconds = self._timed(lambda: naive_greedy(self.live, text, self.drop))
        return self._of(Plan(self.layers, tuple(found)), seconds)

    def _recipe(self) -> Path:
        """The cut by distance, which is written and repaired."""
        path = self.folder / "block.yml"
        if not path.is_file():
            start = self._profile().best_block(self.drop)
            write_recipe(self.cut, Plan(self.layers, tuple(range(start, start + self.drop))), path)
        return path

    def _prune(self) -> dict[str, Any]:
        recipe = self._recipe()

        def work() -> Path:
            out = self.folder / f"pruned-{time.time_ns()}"
            prune(recipe, out)
            return out

        return self._written(*self._timed(work))

    def _mergekit(self) -> dict[str, Any]:
        """Slices of the base as it is, without the config that lmprune repairs for some architectures."""
        plan = open_cut(self._recipe()).plan
        assert plan is not None
        runs = [[layer, layer + 1] for layer in plan.kept]
        slices = [{"sources": [{"model": str(self.cut.base.path), "layer_range": run}]} for run in runs]
        config, out = self.folder / "mergekit.yml", self.folder / f"mergekit-{time.time_ns()}"
        config.write_text(yaml.safe_dump({"merge_method": "passthrough", "dtype": "bfloat16", "slices": slices}))
        done, seconds = process([str(Path(sys.executable).with_name("mergekit-yaml")), str(config), str(out)])
        if done.returncode:
            return {"why": last_line(done.stderr)}
        return self._written(out, seconds)

    def _optipfair(self, kind: str, amount: str) -> dict[str, Any]:
        found = optipfair(self.cut.base.path, self.folder, kind, amount)
        if isinstance(found, str):
            return {"why": found}
        said = f"the last {amount} layers" if kind == "depth" else f"{amount} % of the neurons"
        return self._written(found.path, found.seconds, said)

    def _both(self) -> dict[str, Any]:
        """The cheap choice by loss, then the repair."""
        recipe, out = self.folder / "one-shot.yml", self.folder / f"both-{time.time_ns()}"
        settings = HealSettings(method="refit", fit_blocks=self.args.fit_blocks, eval_blocks=self.args.eval_blocks)

        def work() -> str:
            choice = one_shot.choose(self.drop, self.board.evidence.fresh().by("loss"))
            write_recipe(self.cut, choice, recipe)
            heal(recipe, out, settings, self.board.fitted_on)
            return described(choice.plan)

        gone, seconds = timed(work)
        return self._written(out, seconds, gone)

    def _repair(self, method: str) -> dict[str, Any]:
        out = self.folder / f"{method}-{time.time_ns()}"
        settings = HealSettings(method=method, fit_blocks=self.args.fit_blocks, eval_blocks=self.args.eval_blocks)
        recipe = self._recipe()
        done, seconds = timed(lambda: heal(recipe, out, settings, self.board.fitted_on))
        return self._written(Path(done.path), seconds)

    # --- what is left -----------------------------------------------------------------------------------------------

    def _of(self, plan: Plan, seconds: float) -> dict[str, Any]:
        return self._judged(pruned_view(self.live, plan), described(plan), seconds)

    def _written(self, out: Path, seconds: float, gone: str | None = None) -> dict[str, Any]:
        patched = out / "recipe.yml"
        live = open_cut(patched).load(dtype="float32") if patched.is_file() else load_model(out, dtype="float32")
        plan = open_cut(self._recipe()).plan
        assert plan is not None, "a recipe has a plan"
        found = self._judged(live, gone or described(plan), seconds)
        shutil.rmtree(out)
        return found

    def _judged(self, live: Any, gone: str, seconds: float) -> dict[str, Any]:
        said, whole = self.board.said(live), self.board.whole
        rise = Mean.of(said.losses - whole.losses, whole.counts)
        shape = parameters(live)[1]
        if shape not in self._speeds:
            self._speeds[shape] = times_as_fast(live, self.live, tokens=self.args.tokens)
        return {
            "gone": gone, "rise": rise.value, "rise_error": rise.stderr, "agreement": said.same_as(whole).value,
            "seconds": seconds, "parameters": parameters(live)[0] / parameters(self.live)[0],
            "speed": self._speeds[shape],
        }  # fmt: skip

    # --- all of it --------------------------------------------------------------------------------------------------

    def fill(self) -> list[dict[str, Any]]:
        """Make what is missing; all rows, with the ratio to lmprune's."""
        rows, first = [], dict[str, float]()
        for job, who, how, make in self.ways():
            wanted = Wanted(self.drop, job, who)
            if wanted.name not in self.board.rows.found:
                print(f"{job}: {who} ...", file=sys.stderr, flush=True)
                try:
                    found = make()
                except (LmpruneError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, OSError) as exc:
                    kind = "" if isinstance(exc, LmpruneError) else f"{type(exc).__name__}: "
                    found = {"why": kind + line_of(exc, 160)}
                self.board.rows.add(wanted, found | {"how": how})
            row = self.board.rows.found[wanted.name]
            if "seconds" in row:
                row["ratio"] = row["seconds"] / first.setdefault(job, row["seconds"])
            rows.append(row)
            self.write(rows)
        return rows

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """The table in both forms, and where it comes from."""
        prefix = self.args.results / self.args.name
        cells = [{"gone": row.get("why", "")} | row for row in rows]
        out = io.StringIO()
        writer = csv.DictWriter(out, [*COLUMNS], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(cells)
        write_text(prefix.with_suffix(".csv"), out.getvalue())
        lines = [
            ["" if row.get(key) is None else format(row[key], form) for key, (_, form) in COLUMNS.items()]
            for row in cells
        ]
        head = [[title for title, _ in COLUMNS.values()], ["--:" if form else "---" for _, form in COLUMNS.values()]]
        origin = self.board.origin(rows) | {"packages": PACKAGES, "columns": COLUMNS}
        told = [*(f"| {' | '.join(line)} |" for line in [*head, *lines]), "", caption(origin), ""]
        write_text(prefix.with_suffix(".md"), "\n".join(told))
        write_json(prefix.with_suffix(".json"), origin)


class Pruned(NamedTuple):
    """What optipfair wrote, the processor's seconds that it took, and the layers that it chose by a text."""

    path: Path
    seconds: float
    layers: list[int] | None


def optipfair(
    source: Path, folder: Path, kind: str, amount: str, rows: Sequence[NDArray[np.int32]] = ()
) -> Pruned | str:
    """Prune by optipfair in a process of its own; or why it could not.

    Args:
        kind: ``width``, with an ``amount`` of neurons in per cent, or ``depth``, with one of layers.
        rows: samples of one length to choose by, where it should: activations for neurons, cosines for layers. Without
            them it goes by weights alone, and takes the last layers.
    """
    why = installed("optipfair", folder.parent)
    if why is not None:
        return why
    out, text = folder / f"optipfair-{kind}-{time.time_ns()}", folder / "optipfair-text.npy"
    if len(rows):
        np.save(text, np.stack(list(rows)))
    words = [sys.executable, "-c", OPTIPFAIR, str(source), str(out), kind, amount, str(text) if len(rows) else "-"]
    done, _ = process(words, PYTHONPATH=str(folder.parent / "packages"))
    if done.returncode:
        return last_line(done.stderr)
    seconds, layers = json.loads(done.stdout.splitlines()[-1])
    return Pruned(out, seconds, layers)


def timed(work: Callable[[], Any]) -> Timed:
    """What it gives, and the processor's seconds that it takes."""
    began = time.process_time()
    found = work()
    return found, time.process_time() - began


def process(words: Sequence[str], **environment: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run a program; the processor's seconds of it."""
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(list(words), capture_output=True, text=True, env=os.environ | environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def last_line(text: str) -> str:
    """Of what a program said."""
    return (text.strip().splitlines() or ["it said nothing"])[-1].strip()[:200]


def installed(package: str, folder: Path, *more: str) -> str | None:
    """Install a peer beside lmprune's environment, and let it be found; why it cannot be, if so."""
    site = folder / "packages"
    named = [f"{package}=={PACKAGES[package]}", *more]
    if not any(site.glob(f"{package.replace('-', '_')}*")):
        done, _ = process([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), *named])
        if done.returncode:
            return f"it does not install: {last_line(done.stderr)}"
    if str(site) not in sys.path:
        sys.path.append(str(site))
    return None


def main(words: Sequence[str] | None = None) -> int:
    """Fill the table; a mistake is one line."""
    options = parser(__doc__, UNREAD)
    options.add_argument("--turns", type=int, default=3, help="of what is timed, of which the fastest counts")
    args = options.parse_args(words)
    args.name, args.tasks = f"peers-{args.name}", "none"
    quiet_hosts()
    quiet_bars()
    try:
        rows = Peers(Board(args)).fill()
    except LmpruneError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    print((args.results / f"{args.name}.md").read_text(encoding="utf-8"))
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
