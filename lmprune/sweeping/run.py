"""The sweep itself: every stage joined, point by point, going on where an earlier run stopped."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lmprune.benching.measuring import Subject, measure
from lmprune.benching.settings import BenchSettings
from lmprune.budgeting.budget import BudgetSettings
from lmprune.budgeting.run import choose_by_budget
from lmprune.choosing import ModelEvidence, choose, write_recipe
from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe
from lmprune.errors import DataError, NetworkError, OutputError, RecipeError, UsageError, UselessRepair, nearest
from lmprune.evaluation.loaded import DEMO_STEPS, DEMO_TASKS, USUAL_STEPS, USUAL_TASKS, LoadedTasks
from lmprune.evaluation.plugin import LmpruneLM
from lmprune.evaluation.points import evaluate_point
from lmprune.evaluation.shared import SharedCut, SharedLM
from lmprune.files import check_output_file, read_json, write_json
from lmprune.forward.machine import pick_device, release, type_to_run
from lmprune.forward.tree import passes, paths_of, walk
from lmprune.healing import HealSettings, heal
from lmprune.healing.facts import Facts
from lmprune.healing.presets import resolve
from lmprune.models.cut import Cut, open_cut, safe_name
from lmprune.profiling import ProfileSettings
from lmprune.profiling.distances import Profile
from lmprune.settings import QUANTIZATIONS, Quantization, several_quantizations
from lmprune.sweeping import agreeing
from lmprune.sweeping.agreed import Agreements
from lmprune.sweeping.folder import Sweep, made_path, recipe_path, results_of, results_path
from lmprune.sweeping.launch import arguments, gpus, run_all, shares, shell_lines
from lmprune.sweeping.points import BASELINE, Point, counts, in_order, point_name
from lmprune.sweeping.result import SweepResult
from lmprune.sweeping.settings import SweepSettings
from lmprune.text.sources import DataSettings
from lmprune.text.tokens import tokenize
from lmprune.versions import versions

_say = logging.getLogger("lmprune").info


def sweep(
    model: str | Path | Recipe | Cut,
    out: str | Path,
    settings: SweepSettings | None = None,
    data: DataSettings | None = None,
) -> SweepResult:
    """Measure many cuts of one model into the folder ``out``, or go on with the sweep that is there.

    Args:
        model: whatever `open_cut` opens; of a cut that stands in no file its recipe is needed.
        data: the text that profiles and healing read. Default: the demo's for the demo model, else C4.

    Raises:
        UsageError: fractions, criteria, tasks, points or a preset that do not exist or fit.
        NetworkError: a task's data, or the model, are not here and cannot be fetched.
        OutputError: ``out`` holds something else.
        HostError: the harness failed, or memory is short.
    """
    run = SweepRun(model, Path(out), settings or SweepSettings(), data or DataSettings())
    prepared = run.prepare()
    if run.settings.launcher is None:
        run.measure(prepared)
    elif commands := run.launch(prepared):
        return SweepResult(run.out, prepared, tuple(point.name for point in run.left(prepared)), commands)
    left = tuple(point.name for point in run.left(prepared))
    if not left and not run.settings.points:
        run.agree(prepared)
        run.bench(prepared)
    return SweepResult(run.out, prepared, left)


@dataclass
class Clock:
    """Time spent, and whether a next piece of work still fits the budget."""

    budget: float | None
    began: float = field(default_factory=time.monotonic)
    longest: dict[str, float] = field(default_factory=dict)

    def fits(self, kind: str) -> bool:
        """Whether work of this kind, as long as the longest so far, would end in time."""
        spent = time.monotonic() - self.began
        return self.budget is None or spent + self.longest.get(kind, 0.0) <= self.budget

    def took(self, kind: str, since: float) -> float:
        """Note work that began at ``since``; its seconds."""
        seconds = time.monotonic() - since
        self.longest[kind] = max(self.longest.get(kind, 0.0), seconds)
        return seconds


class SweepRun:
    """A sweep of ``model`` in the folder ``out``. Making one checks everything that can be checked without work.

    Raises:
        UsageError: fractions, criteria, tasks, points or a preset that do not exist or fit.
        NetworkError: a task's data, or the model, are not here and cannot be fetched.
        OutputError: ``out`` holds something else.
    """

    def __init__(
        self, model: str | Path | Recipe | Cut, out: Path, settings: SweepSettings, data: DataSettings
    ) -> None:
        self.out, self.settings, self.data = out, settings, data
        self.cut = _opened(model)
        self.base = self.cut.base
        self.layers = self.cut.layers
        self.device = str(pick_device(settings.device))
        self.sizes = counts(settings.shares(), self.layers)
        self.criteria = settings.names("criteria")
        _check_folder(out)
        names = list(settings.names("tasks") or (DEMO_TASKS if self.cut.is_demo else USUAL_TASKS))
        # Where only the demo world is asked for, the steps are the demo world's too, which need no network.
        steps = DEMO_STEPS if all(name.startswith(DEMO_TASKS) for name in names) else USUAL_STEPS
        self.identity = settings.identity() | {"data": asdict(data)}
        self.before = Sweep.read(out) if (out / "sweep.json").is_file() else None
        if self.before is not None:  # before tasks are loaded, which takes long
            self.before.check_same(self.identity, self.cut.fingerprint, out)
            names = list(dict.fromkeys([*self.before.tasks, *names]))
        self.dtype = self._type_to_run()
        self.given = self._opened_recipes()
        self.searched = {f"params-{round(100 * share):02d}": share for share in settings.budgets()}
        if self.searched and (self.cut.plan is not None or settings.quantization is not None):
            raise UsageError("--params searches among cuts of an uncut model in its own type. Leave --quantization out")
        self._check_points()
        self.evidence = self._evidence(self.dtype)
        metadata = {"pretrained": self.base.name, "revision": self.base.revision}
        self.tasks = LoadedTasks(names, metadata, steps=steps, include_path=settings.include_path)
        if self.tasks.added:
            _say(f"added {self.tasks.added}: cuts break reasoning first, so a sweep always measures it")
        self.clock = Clock(settings.seconds())

    def _type_to_run(self) -> str:
        """In which type points are measured: as the folder's were, where it says nothing else."""
        asked = self.settings.dtype
        if asked != "auto" or self.settings.quantization is not None:
            return asked
        known = self.before.model.get("dtype") if self.before is not None else None
        return str(known) if known is not None else type_to_run(self.cut, asked, self.device, stream=False)

    def _check_points(self) -> None:
        """Refuse names in ``--points`` that this sweep will not have, before anything is made."""
        cuts = [point_name(name, n) for name in self.criteria for n in self.sizes]
        cuts += [name for name in (*self.given, *self.searched) if name not in cuts]
        cuts += [point.name for point in self.known if point.is_cut and not point.made and point.name not in cuts]
        whole = [BASELINE, *(f"{BASELINE}-{kind}" for kind in self.few_bits)]
        known = [*whole, *cuts, *(f"{cut}-{made}" for made in (*self.few_bits, *self.made) for cut in cuts)]
        for name in self.settings.names("points"):
            if name not in known:
                raise UsageError(f"--points: no point {name!r}{nearest(name, known)}. Points: {', '.join(known)}")

    @property
    def made(self) -> tuple[str, ...]:
        """What becomes of each cut besides itself, as a checkpoint of its own."""
        wanted = {"repaired": self.settings.repair, "healed": self.settings.heal}
        return tuple(name for name, asked in wanted.items() if asked is not None)

    @property
    def few_bits(self) -> tuple[Quantization, ...]:
        """In which the base and each cut are measured besides their own type: those that were there, and new ones."""
        asked = {*several_quantizations(self.settings.quantizations), *(point.quantization for point in self.known)}
        return tuple(kind for kind in QUANTIZATIONS if kind in asked)

    # --- preparing ----------------------------------------------------------------------------------------------

    @property
    def known(self) -> tuple[Point, ...]:
        """The points that this folder had when the run began."""
        return self.before.points if self.before is not None else ()

    def prepare(self) -> Sweep:
        """The profile, the recipes and ``sweep.json``: all that points need."""
        cuts = [point for point in self.known if point.is_cut and not point.made]
        names = {point_name(name, n): (name, n) for name in self.criteria for n in self.sizes}
        given = {cut.name for cut in cuts if cut.parts} | {*self.given, *self.searched}
        names |= {cut.name: (cut.name.rpartition("-")[0], cut.n) for cut in cuts if cut.name not in given}
        made = {name for name in names if (self.out / "recipes" / f"{name}.yml").is_file()}
        self.choices = {
            point: choose(self.cut, name, drop=n, evidence=self.evidence)
            for point, (name, n) in names.items()
            if point not in made
        }
        for choice in self.choices.values():
            if choice.plan.parts:
                raise UsageError(_no_sublayers(choice.criterion or "by hand"))
        # What stands in the folder stays as it is; what is new comes to it.
        have = {point.name for point in cuts}
        cuts += [self._found(name) for name in names if name not in have | {*self.choices}]
        cuts += [
            Point(name, choice.criterion, self.layers, choice.plan.dropped)
            for name, choice in self.choices.items()
            if name not in have
        ]
        cuts += [self._given(name) for name in self.given if name not in have]
        cuts += [self._searched(name, share) for name, share in self.searched.items() if name not in have]
        whole = Point(BASELINE, None, self.layers, ())
        # Weights of few bits cannot be narrowed, and each kind of weights is loaded once.
        changed = [point.made_into(kind) for kind in self.few_bits for point in (whole, *cuts) if not point.parts]
        changed += [cut.made_into(made) for made in self.made for cut in cuts]
        points = [whole, *cuts, *changed]
        sweep = self._sweep(cuts, points)
        if self.before is not None:
            self.before.check_data(sweep.data, self.out)
            sweep = replace(
                self.before,
                settings={
                    **self.identity,
                    "tasks": self.before.settings.get("tasks"),
                    **_together(self.before.settings, self.identity),
                },
                tasks=sweep.tasks,
                data=sweep.data,
                points=self.known if {*points} == {*self.known} else sweep.points,
                passes=sweep.passes,
            )
        if sweep != self.before:
            sweep.write(self.out)
        for point in cuts:
            if point.name in self.choices and not recipe_path(self.out, point).is_file():
                self._write_recipe(point)
        return sweep

    def _given(self, name: str) -> Point:
        """The point of a recipe of ``--recipes``, which is written into the folder with the file that it needs."""
        cut = self.given[name]
        assert cut.plan is not None and cut.recipe is not None
        path = self.out / "recipes" / f"{name}.yml"
        path.parent.mkdir(parents=True, exist_ok=True)
        written = cut.recipe.write(path, mergekit=False)
        return Point(name, name.rpartition("-")[0], self.layers, cut.plan.dropped, parts=written.parts)

    def _searched(self, name: str, share: float) -> Point:
        """The best cut that leaves such a share of the parameters; its recipe stays, and is not searched for again."""
        path = self.out / "recipes" / f"{name}.yml"
        if not path.is_file():
            _say(f"{name}: search for the best cut with {share:.0%} of the parameters")
            path.parent.mkdir(parents=True, exist_ok=True)
            found = choose_by_budget(BudgetSettings(params=share), self._evidence(self.settings.dtype).in_float32())
            write_recipe(self.cut, found.choice, path)
        cut = open_cut(path)
        if cut.plan is None or cut.checkpoint.fingerprint != self.cut.fingerprint:
            raise RecipeError(f"{path} is for another model than {self.cut.name}. Remove it, or choose a new folder")
        return Point(name, "params", self.layers, cut.plan.dropped, parts=cut.plan.parts)

    def _opened_recipes(self) -> dict[str, Cut]:
        """The cuts of ``--recipes``, by the names of their points.

        Raises:
            RecipeError: one is no recipe, or of another model.
            UsageError: two would be called alike, or weights of few bits are to be narrowed.
        """
        found: dict[str, Cut] = {}
        for given in self.settings.names("recipes"):
            cut = open_cut(given)
            if cut.plan is None or cut.recipe is None or self.cut.plan is not None:
                raise RecipeError(
                    f"--recipes {given}: it is no recipe of {self.cut.name}. Give recipes of the uncut model"
                )
            if cut.checkpoint.fingerprint != self.cut.fingerprint:
                raise RecipeError(f"--recipes {given}: it is for another model than {self.cut.name}")
            if cut.plan.parts and self.settings.quantization is not None:
                raise UsageError(
                    f"--quantization: {given} {cut.plan.describe()}, which weights of few bits cannot. Leave one out"
                )
            name = point_name(safe_name(Path(given).stem), len(cut.plan.dropped))
            if name in found:
                raise UsageError(f"--recipes: two of them would be the point {name}. Rename one")
            found[name] = cut
        return found

    def _found(self, name: str) -> Point:
        """The point of a recipe that stood in the folder before there was a sweep.

        Raises:
            RecipeError: it is of another model, or of no such cut.
        """
        path = self.out / "recipes" / f"{name}.yml"
        cut = open_cut(path)
        if self.cut.plan is not None or cut.checkpoint.fingerprint != self.cut.fingerprint or cut.plan is None:
            raise RecipeError(f"{path} is for another model than {self.cut.name}. Remove it, or choose a new folder")
        found = Point(name, name.rpartition("-")[0], self.layers, cut.plan.dropped)
        if point_name(str(found.criterion), found.n) != name or cut.plan.parts:
            raise RecipeError(f"{path} drops other than {name} says. Remove it, or choose a new folder")
        return found

    def _sweep(self, cuts: Sequence[Point], points: Sequence[Point]) -> Sweep:
        """What ``sweep.json`` says of these points, of which ``cuts`` are measured unhealed."""
        whole = Plan(self.layers)
        shared, separate = passes(walk(paths_of({BASELINE: whole, **{cut.name: cut.plan or whole for cut in cuts}})))
        return Sweep(
            model={
                "name": self.cut.name,
                "revision": self.base.revision,
                "fingerprint": self.cut.fingerprint,
                "layers": self.layers,
                "dtype": str(self.cut.dtype(self.dtype)).removeprefix("torch."),
            },
            settings=self.identity,
            points=tuple(in_order(points)),
            tasks=tuple(self.tasks.names),
            data=self.tasks.data(self.settings.limit),
            passes={"shared": shared, "separate": separate},
            versions=versions(),
            hardware=hardware(self.device),
        )

    def _evidence(self, dtype: str) -> ModelEvidence:
        """What criteria ask for: a profile that was given, or one that is made when it is asked for."""
        settings = ProfileSettings(
            samples=self.settings.samples,
            device=self.device,
            dtype=dtype,
            quantization=self.settings.quantization,
            seed=self.settings.seed,
        )
        given = Profile.read(Path(self.settings.profile)) if self.settings.profile else None
        data = replace(self.data, bos=None) if self.made and not self.data.pack else self.data
        return ModelEvidence(self.cut, settings, data, known=given, profile_file=self.out / "profile.json")

    def _write_recipe(self, point: Point) -> None:
        write_recipe(self.cut, self.choices[point.name], recipe_path(self.out, point))
        if self.evidence.has_profile and not (self.out / "profile.json").is_file():
            self.evidence.profile().write(self.out / "profile.json")

    # --- measuring ----------------------------------------------------------------------------------------------

    def measure(self, sweep: Sweep) -> list[Point]:
        """Evaluate all points that lack results; those that did not fit the budget."""
        left = self.left(sweep)
        for kind in (None, *QUANTIZATIONS):
            self._measure_cuts(
                sweep, [point for point in left if not point.folder and point.quantization == kind], kind
            )
        for point in (point for point in left if point.folder):
            if self.clock.fits(point.made):
                self._measure_made(sweep, point)
        left = self.left(sweep)
        if not left:
            for kind in (None, *QUANTIZATIONS):
                self._journal(kind).unlink(missing_ok=True)
        return left

    def _opened_alone(self, point: Point) -> dict[str, Any]:
        """How lm_eval opens the model of this point by itself."""
        held = {"quantization": point.quantization} if point.quantization else {}
        if point.plan is None:
            return {"pretrained": self.cut.name, **self._type, **held}
        recipe = str(recipe_path(self.out, point).resolve())
        return {"pretrained": self.base.name, "recipe": recipe, **self._type, **held}

    @property
    def _type(self) -> dict[str, Any]:
        """The type as lm_eval is told, where it would not take that by itself."""
        return {"dtype": self.dtype} if self.dtype != "auto" else {}

    def wanted(self, sweep: Sweep) -> list[Point]:
        """The points that were asked for: all, or those of ``--points``."""
        names = self.settings.names("points")
        return [point for point in sweep.points if not names or point.name in names]

    def left(self, sweep: Sweep) -> list[Point]:
        """Those of them that lack results, or a task's."""
        return [point for point in self.wanted(sweep) if self._lacking(sweep, point)]

    def _lacking(self, sweep: Sweep, point: Point) -> tuple[str, ...]:
        """The tasks that a point has no results of."""
        found = results_of(self.out, point)
        if found is None:
            return sweep.tasks
        measured = found.note.get("tasks", self.before.tasks if self.before is not None else sweep.tasks)
        return tuple(name for name in sweep.tasks if name not in measured)

    def launch(self, sweep: Sweep) -> tuple[str, ...]:
        """Hand the points to processes; the commands instead, where they are to be printed."""
        parts = shares(self.wanted(sweep), self.settings.processes or max(1, gpus()))
        lines = [arguments(self.cut.name, self.out, self.settings, self.data, part) for part in parts]
        if self.settings.launcher == "print":
            return shell_lines(lines)
        run_all(lines)
        return ()

    def _measure_cuts(self, sweep: Sweep, points: list[Point], kind: str | None) -> None:
        """Evaluate ``points``, all of one type, of one load."""
        if not points or (kind and not self.clock.fits("unhealed")):
            return
        _say(f"load {self.cut.name} once{f' in {kind}' if kind else ''} for {len(points)} points")
        cuts = [SharedCut(p.name, p.plan, recipe_path(self.out, p) if p.plan else None) for p in points]
        share, arguments = self.settings.share, self._model_arguments(kind)
        with closing(SharedLM(self.cut.name, cuts, journal=self._journal(kind), share=share, **arguments)) as model:
            for number, point in enumerate(points, 1):
                if number > 1 and not self.clock.fits("unhealed"):
                    return
                since = time.monotonic()
                model.use(point.name)
                self._evaluate(sweep, point, model, self._opened_alone(point))
                # The first one scores for all, so it says nothing about the next.
                seconds = self.clock.took("unhealed" if number > 1 else "first", since)
                _say(f"{point.name}: {seconds:.0f} s ({number} of {len(points)})")
        del model
        release()

    def _measure_made(self, sweep: Sweep, point: Point) -> None:
        since = time.monotonic()
        folder = made_path(self.out, point)
        if not folder.is_dir():
            _say(f"{'heal' if point.healed else 'repair'} {point.unhealed}")
            repaired = folder.parent.with_name("repaired") / folder.name
            start = repaired if point.healed and repaired.is_dir() else recipe_path(self.out, point)
            settings = self.healing(point) if point.healed else self.repairing()
            try:
                heal(start, folder, settings, self.data)
            except UselessRepair as exc:  # of this cut: the others may gain
                _say(f"{point.name} is left out: {exc}")
                return
            release()
        model = LmpruneLM(str(folder), **self._model_arguments())
        self._evaluate(sweep, point, model, {"pretrained": str(folder.resolve()), **self._type})
        del model
        release()
        _say(f"{point.name}: {self.clock.took(point.made, since):.0f} s")

    def repairing(self) -> HealSettings:
        """How a point is repaired."""
        return HealSettings(method=self.settings.repair, seed=self.settings.seed, device=self.device)

    def healing(self, point: Point) -> HealSettings:
        """How a point is healed."""
        given: dict[str, Any] = {
            "preset": self.settings.heal or "quick",
            "steps": self.settings.heal_steps,
            "seed": self.settings.seed,
            "device": self.device,
            "repair_first": self.settings.repair is None,  # else it was done before, or did not help
        }
        if self.settings.quantization is not None:
            # An adapter is trained on weights in as few bits as those that are measured; nothing else can be.
            few = HealSettings(**given, quantization=self.settings.quantization)
            with suppress(UsageError):
                resolve(few, Facts.of(self.cut.without(point.plan, point.name)))
                return few
        return HealSettings(**given)

    def _evaluate(self, sweep: Sweep, point: Point, model: LmpruneLM, model_args: Mapping[str, Any]) -> None:
        evaluate_point(
            model,
            self.tasks.only(self._lacking(sweep, point)),
            results_path(self.out, point),
            model_args=model_args,
            batch_size=model.batch_size,
            limit=self.settings.limit,
            seed=self.settings.seed,
            provenance={
                "point": point.to_data(),
                "base": dict(sweep.model),
                "settings": dict(sweep.settings),
                "data": dict(sweep.data),
                "tasks": list(sweep.tasks),
                "versions": versions(),
                "hardware": hardware(self.device),
            },
        )

    def _model_arguments(self, kind: str | None = None) -> dict[str, Any]:
        size = self.settings.batch_size or ("auto" if self.device.startswith("cuda") else "32")
        arguments: dict[str, Any] = {
            "device": self.device,
            "dtype": self.dtype,
            "batch_size": size if size == "auto" else int(size),
        }
        if kind or self.settings.quantization is not None:
            arguments["quantization"] = kind or self.settings.quantization
        return arguments

    def _journal(self, kind: str | None = None) -> Path:
        """Scores of all points of a type, kept until each has its results; one for each process of a launcher."""
        part = hashlib.sha256(self.settings.points.encode()).hexdigest()[:8] if self.settings.points else "all"
        return self.out / f".scores-{part}{f'-{kind}' if kind else ''}.jsonl"

    # --- agreement ----------------------------------------------------------------------------------------------

    def agree(self, sweep: Sweep) -> None:
        """Measure how often all points still say what the base says, once; without text it is left out."""
        before = Agreements.read(self.out)
        points = [point for point in sweep.points if not self._lacking(sweep, point)]
        lack = [point for point in points if before is None or point.name not in before.points]
        if not self.settings.agree or not lack or not self.clock.fits("agree"):
            return
        how = {"device": self.device, "dtype": self.dtype, "quantization": self.settings.quantization}
        try:
            text = tokenize(
                replace(self.data, bos=None) if not self.data.pack else self.data,
                self.cut.tokenizer(),
                samples=self.settings.agree,
                max_length=min(agreeing.LENGTH, self.cut.window or agreeing.LENGTH),
                seed=self.settings.seed + 1,  # other text than the profile's
                default=self.cut.default_data,
            )
        except (NetworkError, DataError) as exc:
            _say(f"agreement is left out: {exc}")
            return
        agreeing.agree(self.out, self.cut, points, text, how)

    # --- speed --------------------------------------------------------------------------------------------------

    def bench(self, sweep: Sweep) -> None:
        """Measure the speed of the base and all cuts in short, in each type, once."""
        path = self.out / "bench.json"
        names = {point.name for point in sweep.points if not point.folder}
        if not self.settings.bench or _benched(path, names) or not self.clock.fits("bench"):
            return
        _say("bench: speed and memory of all points in turns")
        subjects = [
            Subject(
                point.name, self.cut.without(point.plan, point.name), point.quantization or self.settings.quantization
            )
            for point in sorted(sweep.points, key=lambda point: point.n)
            if not point.folder
        ]
        asked = BenchSettings(prompts="64", batch_sizes="1", tokens=16, device=self.device, dtype=self.settings.dtype)
        write_json(path, measure(subjects, asked).to_data())


def _opened(model: str | Path | Recipe | Cut) -> Cut:
    cut = open_cut(model)
    if cut.adapter is not None:
        raise UsageError(f"{cut.name} has an adapter, which no recipe can say. Merge it with PEFT, or sweep its base")
    # Each point, and each process, opens the model again by its name.
    if isinstance(model, Recipe) or (isinstance(model, Cut) and open_cut(cut.name).fingerprint != cut.fingerprint):
        raise UsageError("this cut stands in no file, so that it could not be opened again. Write its recipe first")
    return cut


def _together(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str | None]:
    """Fractions, criteria and quantizations of both: those that were there, then those that are new."""
    both = {
        key: [word for value in (before.get(key), now[key]) if value for word in str(value).split(",")]
        for key in ("fractions", "criteria", "quantizations")
    }
    return {key: ",".join(dict.fromkeys(map(str.strip, words))) or None for key, words in both.items()}


def _benched(path: Path, names: set[str]) -> bool:
    """Whether the speed of these points is known, or the file is of another origin: of more models, or of others.

    Ratios are taken in turns, so where points have come to a sweep all of them are measured again.
    """
    try:
        data = read_json(path, RecipeError, "Remove it and run the sweep again")
        return not {row["name"] for row in data["rows"]} < names
    except FileNotFoundError:
        return False
    except (KeyError, TypeError) as exc:
        raise RecipeError(f"{path} was not written by `lmprune bench`. Move it elsewhere") from exc


def _check_folder(out: Path) -> None:
    check_output_file(out / ".sweep")
    if out.is_dir() and any(out.iterdir()) and not (out / "sweep.json").is_file():
        known = {"profile.json", "profile.json.partial", "recipes", "pruned", "repaired", "healed"}
        foreign = sorted(
            entry.name for entry in out.iterdir() if entry.name not in known and not entry.name.startswith(".")
        )
        if foreign:
            raise OutputError(f"{out} is not empty and no sweep: it holds {foreign[0]!r}. Choose a new folder with -o")


def hardware(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    found: dict[str, Any] = {"device": device, "machine": platform.machine(), "system": platform.system()}
    found |= {"cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()}
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    found["cpu"] = next(
        (line.partition(":")[2].strip() for line in names if line.startswith("model name")), platform.processor()
    )
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(torch.device(device))
        found |= {"gpu": properties.name, "gpu_memory": properties.total_memory}
    return found


def _no_sublayers(criterion: str) -> str:
    return (
        f"--criteria {criterion}: it drops sublayers, and the points of a sweep are whole layers. Make its recipe with "
        "`lmprune recipe`"
    )
