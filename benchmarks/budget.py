"""What fits a budget: layers, neurons and width together, beside depth alone and a peer, on unseen text.

    python -m benchmarks.budget demo                                    shares 0.75 and 0.5: an hour of one core
    python -m benchmarks.budget MODEL --text FILE.txt --params 0.9,0.8,0.7 --search "--with depth,ffn" [--name NAME]

For each share of the parameters, embeddings not counted: `lmprune recipe --params` and `lmprune heal --method refit` by
their defaults, or with what ``--search`` and ``--refitting`` add; the same of whole layers alone; whole layers alone
once more for the speed of the first (``--speed``), since equal size is not equal speed where a model is tiny; and
optipfair 0.4.2's width and depth, which see the text that the recipe is chosen on. Nothing is trained.

Loss is nats a token above the whole model's, as cut and refitted, on text that nothing was chosen or fitted on; speed
is prefill and decoding together, in turns with the whole model. Seconds are the processor's, peak is the process's
memory, and passes are what the search took of the whole model over the text that it chooses on, with its refits. Rows
are kept in `build/scoreboard/budget-NAME` and made once. Run it with OMP_NUM_THREADS=1. Writes NAME.csv and NAME.json
to benchmarks/results, which `scripts/figures.py` renders.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import tables
from benchmarks.peers import optipfair
from benchmarks.scoreboard import Board, Made, command, described, parameters, parser
from lmprune.benching.measuring import times_as_fast
from lmprune.errors import LmpruneError, UsageError
from lmprune.forward.agreement import Mean
from lmprune.forward.views import pruned_view
from lmprune.models.cut import open_cut
from lmprune.models.loading import load_model
from lmprune.models.stack import find_stack
from lmprune.quiet import quiet_bars, quiet_hosts

SEARCH, DEPTH, AS_FAST = "lmprune", "lmprune, layers alone", "lmprune, layers alone, as fast"
WIDTH_PEER, DEPTH_PEER = "optipfair 0.4.2, width", "optipfair 0.4.2, depth"
WHOLE = "whole"
SAME = ("samples", "max_length", "held_out", "limit", "search", "refitting")
"""Options that numbers depend on."""
UNREAD = (
    "drop", "budget", "criteria", "draws", "refit", "healed", "heal", "kinds", "objective", "fit-blocks", "eval-blocks",
    "fit-tokens", "share", "keep-checkpoints",
)  # fmt: skip
"""Options of a scoreboard that change nothing here, and so are not offered."""
RUNS = 9
"""Turns of which a speed is the median."""
COLUMNS = {
    "asked": ["budget", ".0%"], "way": ["by", ""], "left": ["gone", ""], "parameters": ["parameters left", ".1%"],
    "cut": ["loss rises, as cut", "+.4f"], "rise": ["refitted", "+.4f"], "agreement": ["says the same", ".1%"],
    "facts": ["facts", ".1%"], "arithmetic": ["arithmetic", ".1%"], "sums": ["sums", ".1%"],
    "speed": ["times as fast", ".2f"], "trials": ["trials", "d"], "passes": ["passes", ",.0f"],
    "seconds": ["search, s", ",.0f"], "peak": ["peak, MB", ",.0f"], "refit_seconds": ["refit, s", ",.0f"],
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A row: which share may be left, and who has it."""

    asked: float
    way: str

    @property
    def name(self) -> str:
        """Of the row, and of its files."""
        return f"{self.asked:g}-{self.way.replace(',', '').replace(' ', '-')}" if self.asked < 1 else WHOLE

    def told(self) -> dict[str, Any]:
        """What its row begins with."""
        return {"name": self.name} | asdict(self)


class Budgets:
    """The rows of one model."""

    def __init__(self, args: Any, run: Callable[[Sequence[str], Path], Made] = command) -> None:
        self.shares = [_share(word) for word in args.params.split(",")]
        self.board, self.args = Board(args, run, same=SAME), args
        self.cut, self.folder, self.rows = self.board.cut, self.board.folder, self.board.rows

    # --- who --------------------------------------------------------------------------------------------------------

    def ways(self, share: float) -> Iterator[tuple[str, Callable[[Asked], dict[str, Any]]]]:
        """Who, and what makes the row."""
        yield SEARCH, lambda row: self._ours(row, ["--params", f"{share:g}"])
        yield DEPTH, lambda row: self._ours(row, ["--params", f"{share:g}", "--with", "depth"])
        yield AS_FAST, self._as_fast
        if not self.args.no_peers:
            yield WIDTH_PEER, lambda row: self._theirs(row, "width")
            yield DEPTH_PEER, lambda row: self._theirs(row, "depth")

    def _ours(self, row: Asked, budget: Sequence[str]) -> dict[str, Any]:
        """Search, refit, and measure what is left."""
        recipe, out = self.folder / f"{row.name}.yml", self.folder / row.name
        text = ["--data", "chosen.txt"] if self.args.text else []
        asked = shlex.split(self.args.search)
        if "--with" in budget and "--with" in asked:
            at = asked.index("--with")
            del asked[at : at + 2]
        words = ["recipe", str(self.args.model), "-o", recipe.name, *budget, *asked, *text]
        made = self.board.run(words, self.folder)
        said = {"command": shlex.join(["lmprune", *self.board.named(words)])}
        if made.why is not None:
            return said | {"why": made.why}
        details = made.data["choice"]
        shutil.rmtree(out, ignore_errors=True)
        healing = ["heal", recipe.name, out.name, "--method", "refit", *shlex.split(self.args.refitting), *text]
        healed = self.board.run(healing, self.folder)
        if healed.why is not None:
            return said | {"why": healed.why}
        plan = open_cut(recipe).plan
        assert plan is not None, "a recipe has a plan"
        found = said | {
            "left": described(plan), "trials": details["trials"], "passes": details["passes"],
            "seconds": made.seconds, "peak": (made.peak or 0) / 1e6, "refit_seconds": healed.seconds,
            "cut": self._rise(self.board.said(pruned_view(self.board.live, plan))),
        }  # fmt: skip
        return found | self._measured(out)

    def _as_fast(self, row: Asked) -> dict[str, Any]:
        speed = self.rows.found[Asked(row.asked, SEARCH).name].get("speed", 1.0)
        if round(speed, 2) <= 1.0:
            return {"why": f"what {SEARCH} left is {speed:.2f} times as fast: so is the whole model"}
        return self._ours(row, ["--speed", f"{speed:.2f}x", "--with", "depth"])

    def _theirs(self, row: Asked, kind: str) -> dict[str, Any]:
        amount = self._amount(row.asked, kind)
        if amount is None:
            return {"why": f"no number of {'neurons' if kind == 'width' else 'layers'} leaves so little"}
        tokens = self.board.read(held_out=False, samples=self.args.samples)
        length = min(map(len, tokens.rows))
        rows = [np.asarray(each[:length], np.int32) for each in tokens.rows]
        done = optipfair(self.cut.base.path, self.folder, kind, str(amount), rows)
        if isinstance(done, str):
            return {"why": done}
        said = f"{amount} % of the neurons" if done.layers is None else ",".join(map(str, done.layers))
        found = {"left": said, "seconds": done.seconds} | self._measured(done.path)
        found["cut"], found["rise"] = found["rise"], None
        return found

    def _amount(self, share: float, kind: str) -> int | None:
        """Layers, or per cent of the neurons, of the model that is just small enough."""
        layers = list(find_stack(self.board.live).layers)
        whole = sum(p.numel() for layer in layers for p in layer.parameters())
        mlps = sum(p.numel() for layer in layers for name, p in layer.named_parameters() if "mlp" in name)
        each = mlps / 100 if kind == "width" else sum(p.numel() for p in layers[0].parameters())
        amount = -int(-(1 - share) * whole // each)
        return amount if amount < (100 if kind == "width" else len(layers)) else None

    # --- what is left -----------------------------------------------------------------------------------------------

    def _rise(self, said: Any) -> float:
        whole = self.board.whole
        return float(Mean.of(said.losses - whole.losses, whole.counts).value)

    def _measured(self, out: Path) -> dict[str, Any]:
        live = load_model(out, dtype="float32")
        found, whole = self.board.said(live), self.board.whole
        speed = times_as_fast(live, self.board.live, tokens=self.args.tokens, runs=RUNS)
        left = parameters(live)[0] / parameters(self.board.live)[0]
        del live
        scores = self._scores(out)
        shutil.rmtree(out)
        return {"rise": self._rise(found), "agreement": found.same_as(whole).value, "parameters": left, "speed": speed,
                **scores}  # fmt: skip

    def _scores(self, source: Path | str) -> dict[str, float]:
        done = self.board.scores({"pretrained": str(source)})
        return {task.removeprefix("lmprune_").partition("_")[2]: value for task, value in done.items()}

    # --- all of it --------------------------------------------------------------------------------------------------

    def fill(self) -> None:
        """Make what is missing."""
        first = Asked(1, "whole model")
        if first.name not in self.rows.found:
            whole = {"left": "nothing", "parameters": 1.0, "cut": 0.0, "agreement": 1.0, "speed": 1.0}
            self.rows.add(first, whole | self._scores(self.cut.name))
        for share in self.shares:
            for way, make in self.ways(share):
                row = Asked(share, way)
                if row.name not in self.rows.found:
                    print(f"{share:g}, {way} ...", file=sys.stderr, flush=True)
                    self.rows.add(row, make(row))
                self.write()

    def write(self) -> None:
        """The table, and where it comes from."""
        rows = [{"left": row.get("why", "")} | row for row in self.rows.found.values()]
        order = [1.0, *self.shares]
        rows.sort(key=lambda row: order.index(row["asked"]) if row["asked"] in order else len(order))
        shown = {key: how for key, how in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
        origin = self.board.origin(rows)
        more = {key: origin[key] for key in ("model", "text", "threads", "hardware")}
        more["commands"] = {row["name"]: row["command"] for row in rows if "command" in row}
        told = {"command": origin["command"], "note": self.args.note}
        tables.write(self.args.name, rows, shown, **told, more=more, folder=self.args.results)


def _share(word: str) -> float:
    try:
        share = float(word)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UsageError(
            f"--params {word!r}: give shares of the parameters between 0 and 1 with commas, as in 0.75,0.5"
        )
    return share


def main(words: Sequence[str] | None = None, run: Callable[[Sequence[str], Path], Made] = command) -> int:
    """Fill the table; a mistake is one line."""
    options = parser(__doc__, UNREAD)
    options.add_argument("--params", default="0.75,0.5", help="shares of the parameters that may stay")
    options.add_argument("--search", default="", help="words for `lmprune recipe`")
    options.add_argument("--refitting", default="", help="words for `lmprune heal --method refit`")
    options.add_argument("--note", default="", help="a sentence below the table")
    options.add_argument("--no-peers", action="store_true")
    args = options.parse_args(words)
    args.name, args.drop = f"budget-{args.name}", "1"
    args.fit_blocks = args.eval_blocks = 0  # whether its text is enough, `lmprune heal` says itself
    quiet_hosts()
    quiet_bars()
    try:
        if args.text is None and args.model != "demo":
            raise UsageError(f"{args.model}: which text? Give --text FILE.txt")
        Budgets(args, run).fill()
    except LmpruneError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    print((args.results / f"{args.name}.csv").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
