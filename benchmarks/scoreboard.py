"""One scoreboard: what every way of choosing costs and leaves, as cut, repaired and healed, at equal weights.

    python -m benchmarks.scoreboard demo                              the demo model: about ten minutes of one core
    python -m benchmarks.scoreboard MODEL --text FILE.txt [--drop 1,2,3,4] [--budget 2h] [--name NAME]

Each row is an lmprune command, which it names; its row is written as it comes, and made once: the same command goes on
where it stopped. Whole layers go by each criterion; neurons alone (``width``) and layers, neurons and hidden size
together (``mixed``) are searched for so that they leave the same share of the parameters. The last fifth of FILE is
held out: loss and agreement are measured there, and nothing is chosen or fitted on it. The demo model's text is its
world.

Loss is nats a token above the whole model's; agreement, how often the likeliest next token is still the whole
model's. Tasks are the demo's, or `lmprune_world` for other models. Seconds are the processor's for the whole command,
peak is its memory; passes are what choosing or solving took, in passes of the whole model over its text. Speed is
decoding, in turns with the whole model, once for each shape. With ``--share`` one process chooses for all rows, so that
what criteria have in common is measured once: seconds and passes are then what each added, and there is no peak.

Run it with OMP_NUM_THREADS=1 for one thread. Writes NAME.csv, NAME.md, NAME.png and NAME.json (command, date, versions,
model, text) to benchmarks/results.
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from lmprune.benching import BenchSettings, counting
from lmprune.benching.measuring import Subject, measure
from lmprune.choosing import ModelEvidence, choose, write_recipe
from lmprune.comparing import gone
from lmprune.criteria import CRITERIA, OWN
from lmprune.criteria.settings import ChoiceSettings
from lmprune.cuts.lineage import Lineage
from lmprune.cuts.plan import Plan
from lmprune.drawing.canvas import COLOURS, GREY, MARKS, render
from lmprune.errors import DataError, LmpruneError, UsageError
from lmprune.evaluation.harness import evaluate
from lmprune.files import write_bytes, write_json, write_text
from lmprune.forward.agreement import Mean, Said, said
from lmprune.forward.views import Views, pruned_view
from lmprune.models.cut import Cut, open_cut
from lmprune.models.fields import layer_count
from lmprune.profiling import ProfileSettings
from lmprune.quiet import quiet_bars, quiet_hosts
from lmprune.sweeping.run import hardware
from lmprune.sweeping.settings import SweepSettings
from lmprune.text.sources import DataSettings
from lmprune.text.tokens import Tokens, tokenize
from lmprune.versions import versions

RESULTS = Path(__file__).parent / "results"
DEPTH = ("angular", "block-influence", "deepest", "random", "one-shot", "greedy", "segment", "best")
SUBLAYERS = ("finercut",)
HELD_OUT_SEED = 1_000_003
"""Of the demo world's documents that are held out; `lmprune` draws by other seeds."""
DEMO_TASKS = ("lmprune_demo_facts", "lmprune_demo_arithmetic")
STAGES = ("cut", "refit", "healed")
SEARCHED = ("search",)
FLOOR = 1e-3
"""Nats a token that the picture shows, at least: its axis is logarithmic."""
SAME = (
    "samples",
    "max_length",
    "held_out",
    "limit",
    "fit_blocks",
    "eval_blocks",
    "fit_tokens",
    "objective",
    "heal",
    "share",
)
"""Options that numbers depend on: a folder goes on only with the same."""
SEPARATE = "Seconds are the processor's for a row's whole command, with loading."
SHARED = (
    "Seconds and passes of a choice are what it added in the process that all share: what one measures, those after it "
    "have for nothing. Those of repairs and healing are the processor's for the whole command."
)
MEASURED = (
    "loss", "rise", "rise_error", "agreement", "agreement_error", "tasks", "parameters", "bytes", "shape", "speed",
    "tokens_per_second", "running_peak",
)  # fmt: skip
"""Of a row, what another row of the same cut need not measure again."""
WORLD_TASKS = ("lmprune_world_facts", "lmprune_world_sums", "lmprune_world_copies")


# --- rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """A row: how many layers' worth goes, of what kind, chosen by what, and what is done to it then."""

    drop: int
    kind: str
    by: str
    stage: str = "cut"

    @property
    def name(self) -> str:
        """Of the row, and of its files."""
        return f"{self.drop}-{self.kind}-{self.by.replace(' ', '-')}-{self.stage}" if self.drop else "whole"

    def told(self) -> dict[str, Any]:
        """What its row begins with."""
        return {"name": self.name} | asdict(self)


def planned(drops: Sequence[int], by: Sequence[str], refit: Sequence[str], kinds: Sequence[str]) -> list[Wanted]:
    """All rows but the healed ones, in the order in which they are made: all cuts of a number, then their repairs."""
    rows = [Wanted(0, "whole", "")]
    for drop in drops:
        ways = [Wanted(drop, "sublayers" if name in SUBLAYERS else "depth", name) for name in by]
        ways += [Wanted(drop, kind, "search") for kind in kinds]
        rows += ways
        rows += [replace(way, stage="refit") for way in ways if way.by in refit or way.kind in kinds]
    return rows


def best_of(found: Mapping[str, Mapping[str, Any]], drop: int, count: int) -> list[Wanted]:
    """The healed rows of a number of layers: of the ``count`` repaired cuts that cost least, each cut once."""
    rows = [row for row in found.values() if row["drop"] == drop and row["stage"] == "refit" and "rise" in row]
    chosen: dict[str, Wanted] = {}
    for row in sorted(rows, key=lambda row: row["rise"]):
        chosen.setdefault(row["gone"], Wanted(drop, row["kind"], row["by"], "healed"))
    return list(chosen.values())[:count]


class Told(Protocol):
    """A row that is wanted."""

    def told(self) -> dict[str, Any]:
        """Its name, and what else it begins with."""


class Rows:
    """The rows of a folder by name, in ``rows.jsonl``; what they were asked with is kept beside them.

    Raises:
        UsageError: the folder holds rows of other settings.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self._file = folder, folder / "rows.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        asked = folder / "asked.json"
        before = json.loads(asked.read_text(encoding="utf-8")) if asked.is_file() else identity
        other = next((key for key in identity if key != "title" and before.get(key) != identity[key]), None)
        if other is not None:
            raise UsageError(
                f"{folder} holds rows with another {other} ({before.get(other)}). Choose another --out, or remove it"
            )
        asked.write_text(json.dumps(dict(identity), indent=1), encoding="utf-8")
        lines = self._file.read_text(encoding="utf-8").splitlines(keepends=True) if self._file.is_file() else []
        whole = [line for line in lines if line.endswith("\n")]  # a kill may leave half of one
        if whole != lines:
            self._file.write_text("".join(whole), encoding="utf-8")
        self.found: dict[str, dict[str, Any]] = {row["name"]: row for row in map(json.loads, whole)}

    def add(self, wanted: Told, row: Mapping[str, Any]) -> None:
        """Keep a row."""
        made = {**wanted.told(), **row}
        self.found[made["name"]] = made
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(made) + "\n")

    def like(self, stage: str, gone: str) -> dict[str, Any] | None:
        """A row that measured the same cut at the same stage."""
        return next(
            (row for row in self.found.values() if (row["stage"], row.get("gone")) == (stage, gone) and "rise" in row),
            None,
        )


@dataclass
class Clock:
    """Whether a next row still fits the budget, by the longest of its stage so far, or of any."""

    budget: float | None
    began: float = field(default_factory=time.monotonic)
    longest: dict[str, float] = field(default_factory=dict)

    def expected(self, stage: str) -> float:
        """Seconds."""
        return self.longest.get(stage, max(self.longest.values(), default=0.0))

    def fits(self, stage: str) -> bool:
        """Whether a row of this stage would end in time."""
        return self.budget is None or time.monotonic() - self.began + self.expected(stage) <= self.budget

    def took(self, stage: str, seconds: float) -> None:
        """Note a row."""
        self.longest[stage] = max(self.longest.get(stage, 0.0), seconds)


# --- making and measuring ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """What a command gave: its JSON, the processor's seconds, the peak of its memory in bytes; ``why`` it failed."""

    data: Mapping[str, Any]
    seconds: float
    peak: int | None
    why: str | None = None


def command(words: Sequence[str], folder: Path) -> Made:
    """Run ``lmprune WORDS --json`` in ``folder``, as a process of its own."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        line = [sys.executable, "-m", "lmprune", *words, "--json"]
        with subprocess.Popen(line, stdout=out, stderr=err, cwd=folder) as process:
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        seconds, peak = used.ru_utime + used.ru_stime, used.ru_maxrss * 1024
        if process.returncode:
            said = err.read().decode(errors="replace").strip().splitlines()
            return Made({}, seconds, peak, said[-1] if said else f"exit status {process.returncode}")
        return Made(json.loads(out.read()), seconds, peak)


class Board:
    """The rows of one model, made and measured.

    Args:
        run: how a command is run; `command`, or in tests something quicker.
        same: options that numbers depend on.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        run: Callable[[Sequence[str], Path], Made] = command,
        same: Sequence[str] = SAME,
    ) -> None:
        self.args, self.run = args, run
        self.cut = open_cut(args.model)
        self.drops = list(dict.fromkeys(_number(word, "--drop", self.cut.layers - 1) for word in args.drop.split(",")))
        self.tasks = [word for word in args.tasks.split(",") if word and word != "none"] if args.tasks else [
            *(DEMO_TASKS if self.cut.is_demo else WORLD_TASKS)]  # fmt: skip
        self.clock = Clock(SweepSettings(budget=args.budget).seconds())
        self.folder = args.out or Path("build") / "scoreboard" / args.name
        identity = {name: getattr(args, name) for name in same} | {
            "model": self.cut.fingerprint,
            "text": _sha(args.text) if args.text else "demo",
            "tasks": self.tasks,
            "layers": self.cut.layers,
            "vocabulary": self.cut.whole_config.get_text_config().vocab_size,
            "title": args.about or args.name,
        }
        self.text = DataSettings(data=self._split() if args.text else "demo", pack=True)
        self._check_text()
        self.rows = Rows(self.folder, identity)

    # --- text -------------------------------------------------------------------------------------------------------

    def _split(self) -> str:
        """Write what is chosen and fitted on, and what is held out, into the folder; the first one's name."""
        source = Path(self.args.text)
        if source.suffix != ".txt":
            raise UsageError(f"--text {source}: give a .txt file, with a blank line between documents")
        try:
            documents = [part for part in source.read_text(encoding="utf-8").split("\n\n") if part.strip()]
        except (OSError, UnicodeDecodeError) as exc:
            raise DataError(f"--text {source}: cannot be read as UTF-8 ({exc})") from exc
        self.folder.mkdir(parents=True, exist_ok=True)
        last = len(documents) // 5
        for name, part in (("chosen.txt", documents[: len(documents) - last]), ("held-out.txt", documents[-last:])):
            write_text(self.folder / name, "\n\n".join(part) + "\n")
        return "chosen.txt"

    def read(self, held_out: bool, samples: int) -> Tokens:
        """Samples of one of the two parts."""
        name = "held-out.txt" if held_out else "chosen.txt"
        how = replace(self.text, data=str(self.folder / name)) if self.args.text else self.text
        seed = HELD_OUT_SEED if held_out else 0
        return tokenize(how, self.cut.tokenizer(), samples=samples, max_length=self.args.max_length, seed=seed)

    def _check_text(self) -> None:
        """Refuse a text that is too short, before anything is measured.

        Raises:
            DataError: it is.
        """
        fitted = (self.args.fit_blocks + 2 * self.args.eval_blocks) * 256 // self.args.max_length
        chosen = max(self.args.samples + max(8, self.args.samples // 2), fitted)
        for held_out, asked in ((True, self.args.held_out), (False, chosen)):
            try:
                found = self.read(held_out, asked).samples
            except DataError:
                found = 0
            if found < asked:
                part = "last fifth" if held_out else "first four fifths"
                less = "--held-out" if held_out else "--samples" + " and --fit-blocks" * bool(self.args.fit_blocks)
                raise DataError(
                    f"--text {self.args.text}: its {part} fill {found} of {asked} samples of {self.args.max_length} "
                    f"tokens that are needed. Give more text, or smaller {less}"
                )

    @property
    def fitted_on(self) -> DataSettings:
        """What is chosen and fitted on, for commands in this process."""
        return DataSettings(data=str(self.folder / "chosen.txt")) if self.args.text else DataSettings()

    @cached_property
    def held_out(self) -> Tokens:
        """What loss and agreement are measured on."""
        return self.read(True, self.args.held_out)

    @cached_property
    def whole(self) -> Said:
        """What the whole model says on it."""
        return self.said(self.live)

    # --- making -----------------------------------------------------------------------------------------------------

    def words(self, row: Wanted) -> list[str]:
        """The command that makes a row, run in the folder."""
        recipe = replace(row, stage="cut").name + ".yml"
        text = ["--data", "chosen.txt"] if self.args.text else []
        if row.stage == "healed":
            return ["heal", recipe, row.name, *shlex.split(self.args.heal), *self._fitting, *text]
        if row.stage == "refit":
            return ["heal", recipe, row.name, "--method", "refit", *self._fitting, *text]
        read = [*text, "--samples", str(self.args.samples), "--max-length", str(self.args.max_length)]
        read += ["--dtype", "float32"]
        losses = ["--loss-samples", str(self.args.samples)]
        head = ["recipe", str(self.args.model), "-o", recipe]
        if row.by == "search":
            share = f"{1 - row.drop / self.cut.layers:.6g}"
            kind = ["--with", "ffn"] if row.kind == "width" else []
            return [*head, "--params", share, *kind, *read[:-2], *losses, "--fit-tokens", str(self.args.fit_tokens)]
        name, _, seed = row.by.partition(" ")
        words = [*head, "--criterion", name, "--drop", str(row.drop), "--no-check"]
        chooser = OWN[name]
        measures = hasattr(chooser, "OBJECTIVE")
        words += read if getattr(chooser, "READS_TEXT", True) else []
        words += losses if measures else []
        words += ["--objective", self.args.objective] if measures and self.args.objective else []
        return words + (["--seed", seed] if seed else [])

    @property
    def _fitting(self) -> list[str]:
        return ["--fit-blocks", str(self.args.fit_blocks), "--eval-blocks", str(self.args.eval_blocks)]

    @cached_property
    def evidence(self) -> ModelEvidence:
        """What criteria ask for, in this process."""
        settings = ProfileSettings(samples=self.args.samples, max_length=self.args.max_length, dtype="float32")
        how = ChoiceSettings(loss_samples=self.args.samples, objective=self.args.objective)
        found = ModelEvidence(self.cut, settings, self.fitted_on, how=how, journal_file=self.folder / "losses.partial")
        found.prepare()
        return found

    def _chosen_here(self, row: Wanted) -> Made:
        """The same choice as of `words`, by evidence that all rows share."""
        name, _, seed = row.by.partition(" ")
        asking = copy.copy(self.evidence)
        asking.seed = int(seed or 0)
        if not hasattr(OWN[name], "OBJECTIVE"):
            asking.how = replace(asking.how, objective=None)
        before, since = asking.passes, time.process_time()
        try:
            made = choose(self.cut, name, drop=row.drop, evidence=asking)
        except LmpruneError as exc:
            return Made({}, 0.0, None, str(exc))
        write_recipe(self.cut, made, self.folder / f"{row.name}.yml")
        return Made({"passes": asking.passes - before}, time.process_time() - since, None)

    def make(self, row: Wanted) -> Made:
        """Carry out a row's command, unless what it writes is there already."""
        if row.stage == "cut":
            here = self.args.share and row.by != "search"
            return self._chosen_here(row) if here else self.run(self.words(row), self.folder)
        if not (self.folder / f"{replace(row, stage='cut').name}.yml").is_file():
            return Made({}, 0.0, None, "there is no cut to repair")
        shutil.rmtree(self.folder / row.name, ignore_errors=True)
        return self.run(self.words(row), self.folder)

    # --- measuring --------------------------------------------------------------------------------------------------

    @cached_property
    def live(self) -> Any:
        """The whole model in memory."""
        return self.cut.load(dtype="float32")

    def _loaded(self, row: Wanted, cut: Cut) -> Any:
        """A cut is a view of the whole model; what was repaired has weights of its own."""
        return pruned_view(self.live, cut.plan) if row.stage == "cut" else cut.load(dtype="float32")

    def said(self, model: Any) -> Said:
        """What a live model says on the text that is held out."""
        return said(Views(model, {"it": Plan(layer_count(model.config.to_dict()))}), self.held_out)["it"]

    def measure(self, row: Wanted) -> dict[str, Any]:
        """Loss, agreement, tasks, size and speed of what a row made."""
        if row.kind == "whole":
            cut, gone, opened = self.cut, "nothing", {"pretrained": self.cut.name}
        else:
            file = self.folder / (f"{row.name}.yml" if row.stage == "cut" else row.name)
            cut, recipe = open_cut(file), open_cut(self.folder / f"{replace(row, stage='cut').name}.yml")
            assert recipe.plan is not None, "a recipe has a plan"
            gone = described(recipe.plan)
            opened = {"pretrained": str(file)}
        before = self.rows.like(row.stage, gone)
        if before is not None:
            return {key: before[key] for key in MEASURED if key in before} | {"gone": gone, "as": before["name"]}
        live = self._loaded(row, cut)
        found = self.whole if row.kind == "whole" else self.said(live)
        rise = Mean.of(found.losses - self.whole.losses, self.whole.counts)
        same = found.same_as(self.whole)
        inner, every = parameters(live)
        size = {"parameters": inner / parameters(self.live)[0], "bytes": every * self.cut.dtype().itemsize}
        shape = f"{every} {row.kind} {row.drop}"
        del live
        return {
            "gone": gone, "loss": found.loss.value, "rise": rise.value, "rise_error": rise.stderr,
            "agreement": same.value, "agreement_error": same.stderr, "tasks": self.scores(opened), **size,
            "shape": shape, **self._speed(cut, row, shape),
        }  # fmt: skip

    def scores(self, opened: Mapping[str, Any]) -> dict[str, float]:
        """Tasks of the harness, of what ``opened`` says in the words of its models."""
        if not self.tasks:
            return {}
        done = evaluate({**opened, "dtype": "float32"}, self.tasks, limit=self.args.limit)["results"]
        return {
            task: next(value for key, value in done[task].items() if key.startswith(("acc,", "exact_match,")))
            for task in self.tasks
        }

    def _speed(self, cut: Cut, row: Wanted, shape: str) -> dict[str, Any]:
        """Of another model of the same shape, where one was measured."""
        for other in self.rows.found.values():
            if other.get("shape") == shape:
                return {key: other[key] for key in ("speed", "tokens_per_second", "running_peak")}
        how = BenchSettings(prompts="64", batch_sizes="1", tokens=self.args.tokens, warmup=2, dtype="float32")
        subjects = [Subject("whole", self.cut), *([Subject("cut", cut)] if row.drop else [])]
        done = measure(subjects, how).rows[-1]
        return {
            "speed": done.decode_ratio.median, "tokens_per_second": done.decode_tokens_per_second,
            "running_peak": done.peak_bytes,
        }  # fmt: skip

    # --- all of it --------------------------------------------------------------------------------------------------

    def fill(self) -> None:
        """Make the rows that are missing, as far as the budget goes.

        Raises:
            UsageError: it goes not even as far as one row.
        """
        args, made, left = self.args, 0, 0
        by = [name for word in args.criteria.split(",") for name in _drawn(word, args.draws)]
        named = [name for word in args.refit.split(",") for name in _drawn(word, args.draws)]
        refit = [*(by if args.refit == "all" else named), *SEARCHED]
        kinds = [kind for kind in args.kinds.split(",") if kind and kind != "none"]
        for name in by:
            CRITERIA.find(name.partition(" ")[0])
        rows = planned(self.drops, by, refit, kinds)
        for made_before in self.rows.found.values():
            self.clock.took(made_before["stage"], made_before.get("wall", 0.0))
        for row in self._in_turn(rows):
            if row.name in self.rows.found:
                continue
            if row.kind != "whole" and not self.clock.fits(row.stage):
                left += 1
                continue
            began = time.monotonic()
            print(f"{row.name} ...", file=sys.stderr, flush=True)
            found = self._row(row)
            wall = time.monotonic() - began
            self.rows.add(row, found | {"wall": round(wall, 1)})
            self.clock.took(row.stage, wall)
            made += row.kind != "whole"
            self.write()
        if left and not made:
            least = self.clock.expected("cut")
            raise UsageError(
                f"--budget {args.budget}: too small for one row, which takes about {least:.0f} s. Give more"
            )
        if left:
            print(f"{left} rows did not fit the budget: the same command makes them", file=sys.stderr)
        self.write()

    def _in_turn(self, rows: Sequence[Wanted]) -> Iterator[Wanted]:
        """The planned rows, and after them the healed ones, which depend on what was found."""
        yield from rows
        for drop in self.drops:
            yield from best_of(self.rows.found, drop, self.args.healed)

    def _row(self, row: Wanted) -> dict[str, Any]:
        if row.kind == "whole":
            return {"command": ""} | self.measure(row)
        said = {"command": shlex.join(["lmprune", *self.named(self.words(row))])}
        twin = self._twin(row)
        if twin is not None:
            kept = ("gone", "seconds", "peak", "passes", *MEASURED)
            return said | {key: twin[key] for key in kept if key in twin} | {"as": twin["name"]}
        done = self.make(row)
        if done.why is not None:
            return said | {"why": done.why}
        cost = {"seconds": round(done.seconds, 1), "peak": done.peak, "passes": self._passes(row, done)}
        found = said | cost | self.measure(row)
        if row.stage != "cut" and not self.args.keep_checkpoints:
            shutil.rmtree(self.folder / row.name, ignore_errors=True)
        return found

    def _twin(self, row: Wanted) -> dict[str, Any] | None:
        """A repair of the very same cut, which is not made again."""
        cut = self.rows.found.get(replace(row, stage="cut").name, {})
        return self.rows.like(row.stage, cut["gone"]) if row.stage != "cut" and "gone" in cut else None

    def _passes(self, row: Wanted, done: Made) -> float | None:
        if row.stage == "cut":
            return done.data.get("passes") or (done.data.get("choice") or {}).get("passes")
        told = Lineage.read(self.folder / row.name)
        healing = (told.healing if told is not None else None) or {}
        return ((healing.get("first") or healing).get("repair") or {}).get("passes")

    def named(self, words: Sequence[str]) -> list[str]:
        """A command's words with files by their names alone."""
        given = (str(self.args.model), str(self.args.text))
        return [Path(word).name if word in given else word for word in words]

    def told(self, words: Sequence[str]) -> list[str]:
        """The same without what is there for readers alone, who find it beside the command."""
        about = [place for place, word in enumerate(words) if word in ("--about", "--text-about")]
        return self.named([word for place, word in enumerate(words) if not {place, place - 1} & {*about}])

    def write(self) -> None:
        """The table in both forms, the picture, and where all of it comes from."""
        prefix = self.args.results / self.args.name
        self.args.results.mkdir(parents=True, exist_ok=True)
        rows = list(self.rows.found.values())
        write_text(prefix.with_suffix(".csv"), csv_of(rows, self.tasks))
        origin, seconds = self.origin(rows), SHARED if self.args.share else SEPARATE
        write_text(
            prefix.with_suffix(".md"), "\n".join([*markdown(rows, self.tasks), "", caption(origin), seconds, ""])
        )
        write_json(prefix.with_suffix(".json"), origin)
        draw(rows, prefix.with_suffix(".png"), self.args.about or self.args.name)

    def origin(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Where the numbers come from."""
        text = (
            {"file": Path(self.args.text).name, "sha256": _sha(self.args.text)} if self.args.text else {"file": "demo"}
        )
        return {
            "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *self.told(sys.argv[1:])]),
            "date": datetime.date.today().isoformat(),
            "model": {"name": Path(str(self.args.model)).name, "about": self.args.about, "layers": self.cut.layers,
                      "fingerprint": self.cut.fingerprint},
            "text": text | {"about": self.args.text_about,
                            "held_out": {"samples": self.held_out.samples, "tokens": int(self.whole.counts.sum())}},
            "tasks": {task: {"limit": self.args.limit} for task in self.tasks},
            "threads": torch.get_num_threads(), "hardware": hardware("cpu"), "versions": versions(),
            "rows": len(rows),
            "note": f"{self.args.about or self.args.name}; text: {self.args.text_about or 'as named'}.",
            "columns": columns(self.tasks),
        }  # fmt: skip


def parameters(model: Any) -> tuple[int, int]:
    """How many a live model has without its embeddings, and in all."""
    ends = {id(end.weight): end.weight.numel() for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    every = counting.parameters(model)
    return every - sum(ends.values()), every


def described(plan: Plan) -> str:
    """What a plan takes: ``4,7; FFN 230``."""
    return gone(plan) or plan.describe()


# --- tables and the picture -----------------------------------------------------------------------------------------


def columns(tasks: Sequence[str]) -> dict[str, list[str]]:
    """Key of a column of the CSV -> its title and format; see benchmarks/tables.py."""
    names = {task: task.removeprefix("lmprune_").partition("_")[2] for task in tasks}
    return {
        "drop": ["layers' worth", "d"], "kind": ["kind", ""], "by": ["chosen by", ""], "stage": ["stage", ""],
        "gone": ["gone", ""], "parameters": ["parameters left", ".1%"], "bytes": ["bytes", ",d"],
        "rise": ["loss rises by", "+.4f"], "rise_error": ["±", ".4f"], "agreement": ["says the same", ".1%"],
        **{name: [name, ".1%"] for name in names.values()},
        "seconds": ["seconds", ",.0f"], "passes": ["passes", ".1f"], "peak": ["peak bytes", ",d"],
        "speed": ["times as fast", ".2f"], "command": ["command", ""],
    }  # fmt: skip


def cells(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Every row as measured, of each number of layers the cheapest first; where a row has nothing, why."""
    ordered = sorted(rows, key=lambda row: (row["drop"], STAGES.index(row["stage"]), row.get("rise", float("inf"))))
    found = []
    for row in ordered:
        scores = {task.removeprefix("lmprune_").partition("_")[2]: v for task, v in row.get("tasks", {}).items()}
        found.append({"gone": row.get("why", "")} | dict(row) | scores)
    return found


def csv_of(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> str:
    """The table as measured, with each row's command."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [*columns(tasks)], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells(rows, tasks))
    return out.getvalue()


def markdown(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> Iterator[str]:
    """The table for people, but for the commands."""
    shown = {key: how for key, how in columns(tasks).items() if key not in ("rise_error", "command")}
    yield f"| {' | '.join(title for title, _ in shown.values())} |"
    yield "|" + "".join("--:|" if form else "---|" for _, form in shown.values())
    for row in cells(rows, tasks):
        told = ["" if row.get(key) is None else format(row[key], form) for key, (_, form) in shown.items()]
        yield f"| {' | '.join(told)} |"


def caption(origin: Mapping[str, Any]) -> str:
    """What made a table, and of which weights and text it is."""
    return f"`{origin['command']}`, {origin['date']}. {origin['note']}"


def draw(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """What the loss rises by, against what is left of the parameters and against speed."""
    from matplotlib.figure import Figure

    spots = [row for row in rows if row["drop"] and "rise" in row]
    if not spots:
        return
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    looks = [(stage, kind) for stage in STAGES for kind in ("depth", "sublayers", "width", "mixed")]
    for axes, across, label in zip(panels, ("parameters", "speed"), (
        "parameters left, without embeddings, %", "decoding, times as fast as the whole model")):  # fmt: skip
        for stage, kind in looks:
            mine = [row for row in spots if (row["stage"], row["kind"]) == (stage, kind)]
            places = [row[across] * (100 if across == "parameters" else 1) for row in mine]
            style = {
                "color": COLOURS[STAGES.index(stage)],
                "marker": MARKS[("depth", "sublayers", "width", "mixed").index(kind)],
            }
            if mine:
                axes.plot(places, [max(row["rise"], FLOOR) for row in mine], linestyle="", alpha=0.75,
                          label=f"{kind}, {stage}" if axes is panels[0] else None, **style)  # fmt: skip
        axes.set(xlabel=label, yscale="log")
        axes.grid(alpha=0.25, color=GREY)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_xaxis()
    panels[0].set_ylabel("loss rises by, nats a token")
    figure.suptitle(title, fontsize=10)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=6)
    write_bytes(path, render(figure, "png", "scoreboard"))


# --- the command line -----------------------------------------------------------------------------------------------


def _number(word: str, option: str, most: int) -> int:
    if not word.strip().isdecimal() or not 1 <= int(word) <= most:
        raise UsageError(f"{option} {word!r}: give numbers from 1 to {most} with commas, as in 1,2")
    return int(word)


def _drawn(word: str, draws: int) -> list[str]:
    return [f"random {seed}" for seed in range(draws)] if word == "random" else [word]


def _sha(path: str | Path) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as exc:
        raise DataError(f"--text {path}: {exc.strerror or exc}") from exc


OPTIONS: dict[str, dict[str, Any]] = {
    "text": {"help": "a .txt file; without one, the demo world"},
    "drop": {"default": "3", "help": "numbers of layers, in the order in which rows are made"},
    "budget": {"help": "start no row that would end later: 2h, 90m"},
    "criteria": {"default": ",".join(DEPTH + SUBLAYERS)},
    "draws": {"type": int, "default": 3, "help": "of random"},
    "refit": {"default": "all", "help": "which criteria's cuts are repaired"},
    "healed": {"type": int, "default": 2, "help": "how many repaired cuts of each number are healed"},
    "heal": {"default": "--method refit+full --steps 40", "help": "how"},
    "kinds": {"default": "none", "help": "other cuts of the same size: width,mixed, which are searched for"},
    "objective": {"help": "of the criteria that measure a loss; default: their own"},
    "tasks": {"help": "of the harness; none for none"},
    "limit": {"type": int, "help": "documents of each task"},
    "samples": {"type": int, "default": 64, "help": "that are chosen on"},
    "max-length": {"type": int, "default": 128},
    "held-out": {"type": int, "default": 64, "help": "samples that are measured on"},
    "fit-blocks": {"type": int, "default": 64, "help": "of 256 tokens, for repairs"},
    "eval-blocks": {"type": int, "default": 8, "help": "that `lmprune heal` judges by"},
    "fit-tokens": {"type": int, "default": 6000, "help": "of each trial of a search"},
    "tokens": {"type": int, "default": 16, "help": "to decode when speed is measured"},
    "share": {"action": "store_true", "default": False, "help": "choose in one process"},
    "keep-checkpoints": {"action": "store_true", "default": False, "help": "keep repaired checkpoints"},
    "name": {"default": "demo", "help": "of the files in the results"},
    "about": {"help": "what the model is, for readers"},
    "text-about": {"help": "what the text is, for readers"},
    "out": {"type": Path, "help": "where rows are kept; default: build/scoreboard/NAME"},
    "results": {"type": Path, "default": RESULTS},
}


def parser(told: str | None = __doc__, without: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The options, but those ``without`` which a benchmark does: they keep their defaults."""
    made = argparse.ArgumentParser(description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model")
    for name, how in OPTIONS.items():
        if name not in without:
            made.add_argument(f"--{name}", **how)
    made.set_defaults(**{name.replace("-", "_"): OPTIONS[name].get("default") for name in without})
    return made


def main(words: Sequence[str] | None = None, run: Callable[[Sequence[str], Path], Made] = command) -> int:
    """Fill the board; a mistake is one line."""
    args = parser().parse_args(words)
    quiet_hosts()
    quiet_bars()
    try:
        if args.text is None and args.model != "demo":
            raise UsageError(f"{args.model}: which text? Give --text FILE.txt")
        Board(args, run).fill()
    except LmpruneError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    print((args.results / f"{args.name}.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
