"""``lmprune run``: the whole path as a list of lmprune's own commands."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer

from lmprune.cli import show
from lmprune.cli.options import Criterion, IncludePath, Limit, Model, with_options
from lmprune.errors import UsageError, UselessRepair
from lmprune.text.sources import DataSettings


@dataclass(frozen=True)
class Stage:
    """One command, and what it leaves: where that is there already, the command has been run."""

    words: tuple[str, ...]
    leaves: Path

    @property
    def line(self) -> str:
        """The command as a person pastes it."""
        return shlex.join(["lmprune", *self.words])


@dataclass(frozen=True)
class Whole:
    """The whole path of one model: which commands, in which folder, in the places where a sweep looks for them.

    Attributes:
        data: the options of `DataSettings` that were given, as words.
    """

    model: str
    folder: Path
    fraction: float
    criterion: str
    repair: str | None
    heal: str | None
    tasks: str | None
    limit: int | None
    samples: int
    max_length: int
    data: tuple[str, ...]
    include_path: str | None = None

    @cached_property
    def point(self) -> str:
        """What the cut is called in the sweep."""
        from lmprune.cuts.plan import count_of_fraction
        from lmprune.models.cut import open_cut
        from lmprune.sweeping.points import point_name

        return point_name(self.criterion, count_of_fraction(self.fraction, open_cut(self.model).layers))

    @cached_property
    def base(self) -> tuple[str, ...]:
        """What the model card calls a base that is a folder here."""
        from lmprune.models.cut import open_cut
        from lmprune.models.locate import DEMO

        name = open_cut(self.model).base.name
        return ("--base", BASE) if name != DEMO and Path(name).is_dir() else ()

    @property
    def recipe(self) -> Path:
        """Where the recipe lies."""
        return self.folder / "recipes" / f"{self.point}.yml"

    @property
    def repaired(self) -> Path:
        """Where the repaired checkpoint lies."""
        return self.folder / "repaired" / self.point

    def choosing(self) -> Iterator[Stage]:
        """Profile, choice and the smaller checkpoint."""
        profile, pruned = self.folder / "profile.json", self.folder / "pruned"
        size = ("--samples", str(self.samples), "--max-length", str(self.max_length))
        yield Stage(("profile", self.model, "-o", str(profile), *size, *self.data), profile)
        chosen = ("--criterion", self.criterion, "--fraction", str(self.fraction), *self.judging(), *size)
        yield Stage(("recipe", str(profile), "-o", str(self.recipe), *chosen, *self.data), self.recipe)
        yield Stage(("prune", str(self.recipe), str(pruned)), pruned)

    def judging(self) -> tuple[str, ...]:
        """The choice is judged after the repair that the cut will have, where the criterion can do so."""
        from lmprune.criteria import CRITERIA

        able = self.repair is not None and hasattr(CRITERIA[self.criterion], "repairs")
        return ("--after", str(self.repair)) if able else ()

    def repairing(self) -> Iterator[Stage]:
        """The repair, which may turn out to help nothing."""
        if self.repair is not None:
            words = ("heal", str(self.recipe), str(self.repaired), "--method", self.repair)
            yield Stage((*words, *self.data), self.repaired)

    def healing(self) -> Iterator[Stage]:
        """Training, of the repaired checkpoint where there is one."""
        if self.heal is not None:
            there, out = self.repaired.is_dir(), self.folder / "healed" / self.point
            words = ("heal", str(self.repaired if there else self.recipe), str(out), "--preset", self.heal)
            yield Stage((*words, *(() if there else ("--no-repair-first",)), *self.data), out)

    @property
    def measured(self) -> dict[str, Any]:
        """What the sweep is asked for: its options by their names."""
        return {
            "criteria": self.criterion, "fractions": str(self.fraction), "repair": self.repair, "heal": self.heal,
            "tasks": self.tasks, "include_path": self.include_path, "limit": self.limit,
        }  # fmt: skip

    def check(self, data: DataSettings) -> None:
        """Refuse, before anything is made, what a later stage would refuse.

        Raises:
            LmpruneError: what that stage would say.
        """
        from lmprune.sweeping.settings import SweepSettings

        settings = SweepSettings(**self.measured)
        settings.check()  # before what takes seconds to import
        from lmprune.sweeping.run import SweepRun

        _ = self.point  # whether there is such a model, and such a share
        if not (self.folder / "sweep.json").is_file():  # with that, the sweep has begun, and was checked
            SweepRun(self.model, self.folder, settings, data)

    def measuring(self) -> Iterator[Stage]:
        """Tasks and speed of all that there is, the page, and a folder with a model card."""
        words = ["sweep", self.model, "-o", str(self.folder)]
        asked = self.measured if self.repaired.is_dir() else {**self.measured, "repair": None}
        for name, value in asked.items():
            words += [f"--{name}", str(value)] if value is not None else []
        yield Stage((*words, *self.data), self.folder / "bench.json")
        page, card = self.folder / "report.html", self.folder / "card"
        yield Stage(("report", str(self.folder), "-o", str(page)), page)
        shared = (
            "push",
            str(self.recipe),
            CARD,
            *self.base,
            "--results",
            str(self.folder),
            "--dry-run",
            "-o",
            str(card),
        )
        yield Stage(shared, card)


BASE, CARD = "user/model", "user/cut"
"""What the model card calls a base that is a folder here, and the repository, until it is pushed to a real one."""


def go(stage: Stage) -> bool:
    """Run one stage, or find that it was run; whether it was run now. Where a program reads ours, its result is none.

    Raises:
        LmpruneError: it failed.
    """
    from lmprune.cli.app import run as command

    done = stage.leaves.exists()
    show.remark(f"{'done before: ' if done else ''}{stage.line}")
    if not done:
        stage.leaves.parent.mkdir(parents=True, exist_ok=True)
        with redirect_stdout(sys.stderr) if show.as_json() else nullcontext():
            command(stage.words)
    return not done


@with_options(DataSettings)
def run(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The run folder.", metavar="RUN/")],
    data: DataSettings,
    fraction: Annotated[float, typer.Option(help="Share of the layers to drop.", metavar="F")] = 0.25,
    criterion: Criterion = "best",
    repair: Annotated[str, typer.Option(help="The repair that trains nothing, or none.", metavar="METHOD")] = "refit",
    heal: Annotated[
        str | None, typer.Option(help="Then also train, by this preset of `lmprune heal`.", metavar="PRESET")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks or groups of the harness. Default: those of a sweep.", metavar="T,...")
    ] = None,
    include_path: IncludePath = None,
    limit: Limit = None,
    samples: Annotated[int, typer.Option(help="Samples that layers are chosen on.", metavar="N")] = 128,
    max_length: Annotated[int, typer.Option(help="Tokens of such a sample, at most.", metavar="T")] = 256,
) -> None:
    """Go the whole path: profile, choose, prune, repair, heal, evaluate, time, report.

    Each stage is a command of its own, printed before it runs. The same command goes on where it stopped, and any stage
    can be run by hand instead.

    Examples:
        lmprune run demo -o whole/
        lmprune run Qwen/Qwen3-0.6B -o whole/ --fraction 0.25 --heal quick --data text.jsonl --tasks arc_easy,gsm8k
    """
    from lmprune.criteria import CRITERIA
    from lmprune.healing.methods import find_method
    from lmprune.healing.methods.base import Repairing
    from lmprune.healing.presets import PRESETS
    from lmprune.settings import check_choice

    CRITERIA.find(criterion)
    if heal is not None:
        check_choice("--heal", heal, tuple(PRESETS))
    if repair != "none" and not issubclass(find_method(repair).way, Repairing):
        raise UsageError(f"--repair {repair}: it trains. Give a method that trains nothing, or none")
    asked = {name: value for name, value in asdict(data).items() if value != getattr(DataSettings(), name)}
    given = tuple(word for name, value in asked.items() for word in _option(name, value))
    path = Whole(
        model, output, fraction, criterion, None if repair == "none" else repair, heal, tasks, limit, samples,
        max_length, given, include_path,
    )  # fmt: skip
    path.check(data)
    rows = []
    for part in (path.choosing, path.repairing, path.healing, path.measuring):
        for stage in part():
            try:
                rows.append({"command": stage.line, "out": stage.leaves, "ran": go(stage)})
            except UselessRepair as exc:
                show.remark(f"{exc}: going on without it")
    report, card = output / "report.html", output / "card" / "README.md"
    show.result(
        f"read {report}; the model card is {card}", {"out": output, "report": report, "card": card, "rows": rows}
    )


def _option(name: str, value: Any) -> Sequence[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    return [flag, str(value)]
