"""The folder that is pushed: a recipe or weights, what was measured, pictures and a card, cleaned of this machine."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from lmprune import hub
from lmprune.cuts.beside import parts_in
from lmprune.cuts.lineage import LINEAGE
from lmprune.cuts.plan import is_stock
from lmprune.cuts.recipe import Recipe
from lmprune.errors import RecipeError, UsageError
from lmprune.files import as_path, write_bytes, write_text
from lmprune.models.companions import check_companions, companions
from lmprune.models.locate import DEMO, MERGED, RECIPE, demo_folder
from lmprune.profiling.distances import Profile
from lmprune.reporting.collect import Collected
from lmprune.sharing import private
from lmprune.sharing.card import Card
from lmprune.sharing.results import Measured
from lmprune.sharing.subjects import Subject, look, model_type, with_runtimes
from lmprune.writing.support import rows

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json", LINEAGE)


@dataclass(frozen=True)
class Bundle:
    """What goes to a repository.

    Attributes:
        repository: ``user/name``.
        subject: the recipe, checkpoint or adapter, by names that hold anywhere.
        measured: what a sweep measured of it.
        profile: the profile that the recipe rests on.
        plain: whether plain mergekit runs the recipe, without a repaired config.
        source: the folder of weights; None for a recipe alone.
    """

    repository: str
    subject: Subject
    measured: Measured | None
    profile: Profile | None
    source: Path | None
    plain: bool
    names: private.Names

    @classmethod
    def of(
        cls, name: str, repository: str, *, results: Path | None = None, weights: Path | None = None,
        base: str | None = None,
    ) -> Bundle:  # fmt: skip
        """Collect what belongs to ``name``, a recipe, or to the folder ``weights``.

        Raises:
            UsageError: ``repository`` is no name of one, or the base has none that others know.
            RecipeError: results or profile are of another recipe.
        """
        hub.check_id(repository)
        whole = look(name)
        subject = with_runtimes(look(str(weights)) if weights is not None else whole)
        if weights is not None and _is_patch_of(subject, whole):
            # The patch lies beside a recipe of its own, which is all that there is to push.
            whole, weights = subject, None
        if weights is not None:
            if subject.kind == "recipe":
                raise RecipeError(
                    f"{weights} holds no weights. Leave --weights out, or give what `lmprune prune` wrote"
                )
            ours, theirs = whole.lineage.base.fingerprint, subject.lineage.base.fingerprint
            if ours and theirs and ours != theirs:
                raise RecipeError(f"{weights} is a cut of the weights {theirs}, and {name} is for {ours}")
            if subject.plan != whole.plan:
                raise RecipeError(
                    f"{weights} is not a cut by {name}: it {_says(subject)}, and the recipe {_says(whole)}"
                )
        elif whole.kind != "recipe" and whole.folder is not None:
            raise UsageError(f"{name} is a folder of weights. Give its recipe, and --weights {name}")
        if whole.recipe is None:
            raise RecipeError(f"{name} has no recipe to push. Make one with `lmprune recipe`")
        known = _known_folders(whole, subject, repository, results, base)
        run = Collected.read(results).alike() if results is not None else None
        if run is not None:
            known |= {str(run.sweep.model.get("path") or run.folder): known["model"], str(run.folder): "RUN"}
        public = known.pop("model")
        plain = hub.is_id(public) and _is_plain(whole.recipe)
        recipe = replace(whole.recipe, model=public, base_folder=None)
        lineage = replace(subject.lineage, base=replace(subject.lineage.base, model=public))
        measured, plan = None, subject.plan
        if run is not None and plan is not None:
            fingerprint = subject.lineage.base.fingerprint
            called = replace(run, sweep=replace(run.sweep, model={**run.sweep.model, "name": public}))
            measured = Measured.of(called, plan, fingerprint, made=subject.lineage.made)
        subject = replace(subject, recipe=recipe, lineage=lineage, name=repository)
        profile = run.profile if run is not None and run.profile is not None else _profile_beside(name, recipe)
        for text in (recipe.choice.get("data"), profile.source if profile is not None else None):
            if isinstance(text, str) and Path(text).is_absolute():  # calibration text in a file: its name is enough
                known[text] = Path(text).name
        names = private.Names(known)
        recipe = replace(recipe, choice=_everywhere(recipe.choice, names))
        lineage = replace(subject.lineage, recipe=_everywhere(subject.lineage.recipe, names))
        subject = replace(subject, recipe=recipe, lineage=lineage)
        return cls(repository, subject, measured, profile, weights, plain, names)

    def write(self, folder: Path, *, copy: bool) -> list[str]:
        """Write all files into ``folder`` and check them; their names.

        Args:
            copy: whether weights are copied, or linked for a folder that does not last.

        Raises:
            OutputError: something in it tells of this machine, or cannot be written.
        """
        assert self.subject.recipe is not None
        base = self.subject.recipe
        path = f"{base.model}@{base.revision}" if base.revision and hub.is_id(base.model) else base.model
        base = replace(base, parts=parts_in(base.parts, folder, inside=self.source is not None))
        self._text(folder / RECIPE, base.to_yaml(path, mergekit=self.plain))
        if self.source is not None:
            self._weights(folder, copy=copy)
        pictures = self._pictures(folder)
        if self.profile is not None:
            self._text(folder / "profile.json", replace(self.profile, model=base.model).to_json())
        if self.measured is not None:
            self._results(folder)
        listed = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        shown = [name for name in listed if "/" not in name and not name.endswith(".safetensors")]
        card = Card(self.repository, self.subject, self.measured, pictures, shown, self.plain)
        self._text(folder / "README.md", card.text())
        owner = self.repository.partition("/")[0]
        private.check(folder, hub.tokens(), (owner, *base.model.split("/")))
        return sorted([*listed, "README.md"])

    def _text(self, path: Path, text: str) -> None:
        write_text(path, self.names.clean(text))

    def _pictures(self, folder: Path) -> dict[str, str]:
        from lmprune.drawing.maps import draw
        from lmprune.drawing.strips import layers_picture
        from lmprune.sharing.telling import headline, part_cut

        found: dict[str, str] = {}
        if self.subject.plan is not None:
            said = headline(self.subject)
            plan = self.subject.plan
            picture = layers_picture(plan.layers, plan.dropped, part_cut(plan), said)
            write_bytes(folder / "pictures" / "layers.png", picture)
            found["pictures/layers.png"] = said
        if self.profile is not None:
            source = self.names.clean(self.profile.source)
            called = replace(self.profile, model=self.subject.lineage.base.model or "", source=source)
            draw(called, folder / "pictures" / "map.png")
            found["pictures/map.png"] = "The angular distance of every block of layers"
        return found

    def _results(self, folder: Path) -> None:
        """The report in Markdown with its pictures, and the scores for the Hub."""
        from lmprune.reporting.page import write_markdown
        from lmprune.reporting.words import published

        assert self.measured is not None
        with tempfile.TemporaryDirectory(prefix="lmprune-") as scratch:
            text, *pictures = write_markdown(self.measured.run, Path(scratch) / "report.md")
            for picture in pictures:
                write_bytes(folder / picture.parent.name / picture.name, picture.read_bytes())
            said = text.read_text(encoding="utf-8")
        for recipe in filter(None, map(self.measured.run.recipe, self.measured.run.sweep.points)):
            # The report leaves only the last part of a folder's name, under which nobody would find the base.
            said = said.replace(published(self.measured.run, recipe).rstrip(), self.names.clean(recipe).rstrip())
        self._text(folder / "report.md", said)
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        for name, entries in self.measured.eval_files(date).items():
            self._text(folder / ".eval_results" / name, yaml.dump(entries, sort_keys=False, allow_unicode=True))

    def _weights(self, folder: Path, *, copy: bool) -> None:
        """The files of a checkpoint or an adapter; of texts, what names this machine goes."""
        assert self.source is not None and self.subject.recipe is not None
        source = self.source.resolve()
        check_companions(source)
        files = {file for pattern in _WEIGHTS for file in source.glob(pattern)} | set(companions(source))
        for file in sorted(files):
            target = folder / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".safetensors":
                (shutil.copyfile if copy else os.symlink)(file, target)
            elif file.suffix == ".json" and file.name in ("config.json", "adapter_config.json", LINEAGE):
                data = json.loads(file.read_text(encoding="utf-8"))
                self._text(target, json.dumps(_named(data, self.subject.recipe), indent=2, ensure_ascii=False) + "\n")
            else:
                shutil.copyfile(file, target)
        if (source / MERGED).is_file():
            shutil.copyfile(folder / RECIPE, folder / MERGED)


def _everywhere(value: Any, names: private.Names) -> Any:
    """Plain data with `Names.clean` in all of its texts, before the card escapes them."""
    if isinstance(value, Mapping):
        return {key: _everywhere(inner, names) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_everywhere(inner, names) for inner in value]
    return names.clean(value) if isinstance(value, str) else value


def _named(data: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """A config or a history that names the base as others call it."""
    data.pop("_name_or_path", None)
    if "base_model_name_or_path" in data:
        data["base_model_name_or_path"] = recipe.model
    if isinstance(data.get("base"), dict):
        data["base"]["model"] = recipe.model
    return data


def _is_patch_of(subject: Subject, whole: Subject) -> bool:
    """Whether ``subject`` is the recipe ``whole`` with a patch, as `lmprune heal` writes it."""
    ours, theirs = subject.plan, whole.plan
    if subject.kind != "recipe" or ours is None or theirs is None or all(map(is_stock, ours.parts)):
        return False
    same = subject.lineage.base.fingerprint == whole.lineage.base.fingerprint
    return same and (ours == theirs or replace(ours, parts=tuple(filter(is_stock, ours.parts))) == theirs)


def _says(subject: Subject) -> str:
    return subject.plan.describe() if subject.plan is not None else "does not say what is missing"


def _known_folders(
    whole: Subject, subject: Subject, repository: str, results: Path | None, base: str | None
) -> dict[str, str]:
    """Folder -> what others call it; under ``model``, the base's own name.

    Raises:
        UsageError: the base is a folder, and nobody said what others call it.
    """
    own = whole.lineage.base.model or ""
    if base is not None:
        if not hub.is_id(base):
            raise UsageError(f"--base {base}: give the base's name on the Hub, such as Qwen/Qwen3-0.6B")
    elif own == DEMO or own == str(demo_folder()):
        base = DEMO
    elif hub.is_id(own) and not as_path(own).is_dir():
        base = own
    else:
        raise UsageError(
            f"the base of {whole.name} is {own or 'not named'}, which is a folder of this machine. Say what others "
            "call it: --base org/model"
        )
    known = {"model": base, str(demo_folder()): DEMO, own: base}
    if subject.folder is not None:
        known[str(subject.folder.resolve())] = repository
    return {folder: name for folder, name in known.items() if folder == "model" or Path(folder).is_absolute()}


def _is_plain(recipe: Recipe) -> bool:
    """Whether plain mergekit runs it: by what was measured of its architecture, or as `lmprune recipe` saw it."""
    kind = model_type(recipe.model)
    if not all(part.mergekit for part in recipe.parts):
        return False
    if kind is None:
        return recipe.base_folder is None
    return any(row.architecture == kind and row.plain_mergekit == "right" for row in rows())


def _profile_beside(name: str, recipe: Recipe) -> Profile | None:
    """The profile that `lmprune recipe` leaves beside a recipe, if it is of the same weights."""
    path = as_path(name).with_suffix(".profile.json")
    if not path.is_file():
        return None
    profile = Profile.read(path)
    return profile if profile.fingerprint == recipe.fingerprint else None
