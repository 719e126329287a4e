"""The run folder: what a sweep remembers, and where everything in it lies. Pure.

sweep.json            settings, points, data, versions: what the run is
profile.json          where a criterion needs one
recipes/POINT.yml     each cut
results/POINT/        the harness's results_*.json and samples_*.jsonl
repaired/POINT/       each repaired checkpoint
healed/POINT/         each healed checkpoint
bench.json            speed and memory
agreement.json        loss, and how often each point says what the base says
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmprune.errors import OutputError, RecipeError, line_of, shown
from lmprune.evaluation.rows import Results, results_in
from lmprune.files import read_json, write_json
from lmprune.forward.journal import changed
from lmprune.sweeping.points import Point

FORMAT = "lmprune-sweep"
VERSION = 1
_KINDS = {
    "model": dict,
    "settings": dict,
    "tasks": list,
    "data": dict,
    "passes": dict,
    "versions": dict,
    "hardware": dict,
}
_KEYS = ("points", *_KINDS)


@dataclass(frozen=True)
class Sweep:
    """What ``sweep.json`` holds.

    Attributes:
        model: name, path, revision, fingerprint and layers of the base.
        settings: `SweepSettings.identity`, and where text came from.
        tasks: the names given to the harness.
        data: each task's documents, by hash.
        passes: layer passes a batch of scoring: ``shared``, ``separate``.
    """

    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    points: tuple[Point, ...]
    tasks: tuple[str, ...]
    data: Mapping[str, Any] = field(default_factory=dict)
    passes: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write ``sweep.json``."""
        body = {name: getattr(self, name) for name in _KEYS}
        body |= {"points": [point.to_data() for point in self.points], "tasks": list(self.tasks)}
        write_json(folder / "sweep.json", {"format": FORMAT, "version": VERSION, **body})

    @classmethod
    def read(cls, folder: Path) -> Sweep:
        """Read ``sweep.json``.

        Raises:
            RecipeError: the folder is missing or is no run folder.
        """
        path = folder / "sweep.json"
        check_inside(folder, path)
        try:
            data = read_json(path, RecipeError, "Run the sweep again in a new folder")
        except FileNotFoundError as exc:
            raise RecipeError(f"{folder} holds no sweep.json. Make one with `lmprune sweep MODEL -o {folder}`") from exc
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
            raise RecipeError(f"{path} is not a sweep of version {VERSION}. Run the sweep again in a new folder")
        missing = [key for key in _KEYS if key not in data]
        if missing:
            raise RecipeError(f"{path}: the key {missing[0]!r} is missing. Run the sweep again in a new folder")
        try:
            points = tuple(Point.from_data(point, (folder / "recipes").absolute()) for point in data["points"])
        except (TypeError, KeyError, ValueError) as exc:
            raise RecipeError(
                f"{path}: its points cannot be read ({line_of(exc, 120)}). Run the sweep again in a new folder"
            ) from exc
        for key, kind in _KINDS.items():
            if not isinstance(data[key], kind):
                raise RecipeError(f"{path}: the key {key!r} is no {kind.__name__}. Run the sweep again in a new folder")
        if not all(isinstance(note, dict) for note in data["data"].values()):
            raise RecipeError(f"{path}: the key 'data' says nothing of tasks. Run the sweep again in a new folder")
        if not all(type(data["passes"].get(name, 0)) is int for name in ("shared", "separate")):
            raise RecipeError(f"{path}: the key 'passes' holds no numbers. Run the sweep again in a new folder")
        if not all(isinstance(data["model"].get(name), str) for name in ("name", "fingerprint")):
            raise RecipeError(f"{path}: its model has no name or fingerprint. Run the sweep again in a new folder")
        names = [point.name for point in points]
        if len(set(names)) < len(names) or any(point.layers != data["model"].get("layers") for point in points):
            raise RecipeError(f"{path}: its points contradict one another. Run the sweep again in a new folder")
        for place in ("recipes", "results", "repaired", "healed"):
            check_inside(folder, folder / place)
        return cls(**{key: data[key] for key in _KEYS} | {"points": points, "tasks": tuple(map(str, data["tasks"]))})

    def check_same(self, settings: Mapping[str, Any], fingerprint: str, folder: Path) -> None:
        """Refuse to go on where numbers would not be comparable.

        Cuts, quantizations and tasks may be added to a run, and healing to all of it.

        Raises:
            OutputError: naming what differs.
        """
        mine = {"repair": None, "quantizations": None, **self.settings, "model": self.model.get("fingerprint")}
        theirs = {**settings, "model": fingerprint}
        free = {
            "fractions",
            "criteria",
            "tasks",
            "quantizations",
            *(("heal", "heal_steps") if mine.get("heal") is None else ()),
        }
        free |= {"repair"} if mine.get("repair") is None and mine.get("heal") is None else set()
        if other_keys := [key for key in changed(mine, theirs) if key not in free]:
            key = other_keys[0]
            raise OutputError(
                f"{folder} holds a sweep with other {' and '.join(other_keys)} ({key}: {shown(mine.get(key))}, now "
                f"{shown(theirs.get(key))}). Give the same again, or another folder"
            )

    def check_data(self, data: Mapping[str, Any], folder: Path) -> None:
        """Refuse to go on where a task asks other documents than it did, or asks them otherwise.

        Raises:
            OutputError: naming the task and what differs.
        """
        for task in sorted({*self.data} & {*data}):
            if other := changed(self.data[task], data[task]):
                raise OutputError(
                    f"{folder} was measured on another {other[0]} of {task}: "
                    f"{shown(self.data[task].get(other[0]))}, now {shown(data[task].get(other[0]))}. "
                    "Measure everything again in a new folder"
                )


def check_inside(folder: Path, path: Path) -> None:
    """Refuse a path of a run folder whose links lead out of it: run folders travel, and are read and cleared by others.

    Raises:
        RecipeError: it leaves ``folder``.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RecipeError(f"{path} is a link that leaves {folder}. Replace it by what it points to")


def results_of(folder: Path, point: Point) -> Results | None:
    """What was measured of a point; None where nothing is.

    Raises:
        RecipeError: the file is none of the harness, or is reached by a link out of the run folder.
    """
    path = results_path(folder, point)
    for inside in (path, *path.glob("*")):
        check_inside(folder, inside)
    return results_in(path)


def recipe_path(folder: Path, point: Point) -> Path:
    """Where a cut's recipe lies."""
    return folder / "recipes" / f"{point.unhealed}.yml"


def results_path(folder: Path, point: Point) -> Path:
    """Where a point's results lie."""
    return folder / "results" / point.name


def made_path(folder: Path, point: Point) -> Path:
    """Where the checkpoint of a repaired or healed point lies."""
    return folder / point.made / point.unhealed
