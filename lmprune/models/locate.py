"""From what a user calls a model to a folder on this machine.

``demo``, a folder, a ``.gguf`` file, a Hub id, ``org/model@revision``, or a base and an adapter as ``BASE+ADAPTER``.
What else a user may give in a model's place, a recipe above all, is opened by `lmprune.models.cut`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lmprune import hub
from lmprune.cuts import library
from lmprune.errors import ModelError, NetworkError, UsageError, nearest, shown
from lmprune.files import as_path
from lmprune.models.companions import WANTED
from lmprune.models.converted import from_pickles, has_only_pickles
from lmprune.models.gguf import SUFFIX, from_gguf

DEMO = "demo"
RECIPE = "recipe.yml"
"""What a recipe is called in a Hub repository."""
ADAPTER = "adapter_config.json"
"""Whatever holds this is an adapter of PEFT's."""
MERGED = "mergekit_config.yml"
"""What mergekit leaves in a checkpoint that it wrote: the recipe, as it was given."""


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk. ``name`` is what recipes and reports call it; ``revision`` is the Hub commit, if any.

    ``converted`` says that ``path`` holds weights made from those of that name: pickles, a GGUF file, or a base and an
    adapter.
    """

    path: Path
    name: str
    revision: str | None = None
    converted: bool = False

    @property
    def short(self) -> str:
        """The name without the folders above it."""
        return Path(self.name).name if Path(self.name).is_absolute() else self.name


def demo_folder() -> Path:
    """The folder of the embedded demo model."""
    return Path(__file__).resolve().parent.parent / "demo" / "model"


def locate_here(model: str, revision: str | None = None) -> ModelFolder:
    """As `locate`, of a name that stands in a file that others may have written: nothing is fetched, nothing merged.

    Raises:
        ModelError: it is not on this machine.
    """
    name, named = hub.split_revision(model)
    if model == DEMO or as_path(model).exists() or not hub.is_id(name):
        return _find(model, revision, False)
    try:
        path = hub.snapshot(name, named or revision, WANTED, fetch=False)
    except NetworkError as exc:
        raise ModelError(f"{shown(model)} is not on this machine. Fetch it with `hf download {name}`") from exc
    return ModelFolder(path, name, hub.commit_of(path) or named or revision)


def locate(model: str, revision: str | None = None, *, allow_pickle: bool = False) -> ModelFolder:
    """Find ``model``, fetching it from the Hub when it is neither ``demo`` nor a folder.

    ``BASE+ADAPTER``, as mergekit spells it, is the base with a LoRA adapter merged into it. With ``allow_pickle``,
    weights that are there only as pickles are converted.

    Raises:
        ModelError: there is no such folder, and no such repository.
        NetworkError: it looks like a Hub id but the Hub cannot be reached.
        UsageError: the name says one revision, and ``revision`` another.
    """
    if "+" in model and not as_path(model).exists():
        return _with_adapter(model, allow_pickle)
    found = _find(model, revision, allow_pickle)
    if allow_pickle and has_only_pickles(found.path):
        return replace(found, path=from_pickles(found.path), converted=True)
    return found


def repository(name: str, revision: str | None = None, *, pickles: bool = False) -> ModelFolder:
    """What the Hub holds under ``name``, which may end in ``@revision``: a model's files, a recipe, or an adapter's.

    Raises:
        ModelError, NetworkError: it cannot be had.
        UsageError: two revisions are asked for.
    """
    model, revision = _one_revision(name, revision)
    path = hub.snapshot(model, revision, WANTED)
    if pickles and not any(path.glob("*.safetensors")):
        path = hub.snapshot(model, revision, (*WANTED, "*.bin"))
    return ModelFolder(path, model, hub.commit_of(path) or revision)


def first_files(name: str, revision: str | None = None) -> ModelFolder:
    """As `repository`, but only what tells a recipe from a model, and the recipe: no weights are fetched for it."""
    model, revision = _one_revision(name, revision)
    path = hub.small(model, revision, (RECIPE, "config.json", ADAPTER))
    return ModelFolder(path, model, hub.commit_of(path) or revision)


def _one_revision(name: str, revision: str | None) -> tuple[str, str | None]:
    model, named = hub.split_revision(name)
    if named and revision not in (None, named):
        raise UsageError(f"{name} names a revision, and revision {revision} another. Give one of them")
    return model, named or revision


def _find(model: str, revision: str | None, allow_pickle: bool) -> ModelFolder:
    if model == DEMO:
        return ModelFolder(demo_folder(), DEMO)
    path = as_path(model)
    if model and path.is_dir():
        if not (path / "config.json").is_file():
            file = next(iter(sorted(path.glob(f"*{SUFFIX}"))), None)
            hint = f". Give the file itself: {file}" if file is not None else ""
            raise ModelError(f"{model} holds no config.json, so it is not a model folder{hint}")
        return ModelFolder(path.resolve(), str(path.resolve()))
    if path.is_file() and path.suffix == SUFFIX:
        return ModelFolder(from_gguf(path), str(path.resolve()), converted=True)
    if model and path.exists():
        raise ModelError(
            f"{model} is a file. Give a model's folder, a Hub id such as Qwen/Qwen3-0.6B, or the word demo"
        )
    if not hub.is_id(hub.split_revision(model)[0]):
        close = nearest(model, library.names())
        raise ModelError(
            f"no model at {model!r}{close}: give a folder, a Hub id such as Qwen/Qwen3-0.6B, or the word demo"
        )
    return repository(model, revision, pickles=allow_pickle)


def _with_adapter(model: str, allow_pickle: bool) -> ModelFolder:
    """The base of ``BASE+ADAPTER``, or of ``BASE@REVISION+ADAPTER``, with the adapter merged."""
    from lmprune.models.adapters import merged_folder

    base_name, _, adapter_name = model.rpartition("+")
    base = locate(base_name, allow_pickle=allow_pickle)
    adapter = locate_adapter(adapter_name, model)
    if as_path(adapter_name).is_dir():
        adapter_name = str(adapter)
    pinned = f"{base.name}@{base.revision}" if base.revision else base.name
    return ModelFolder(merged_folder(base.path, adapter), f"{pinned}+{adapter_name}", converted=True)


def locate_adapter(name: str, whole: str) -> Path:
    """The folder of the adapter called ``name``, which stands behind the last + of ``whole``.

    Raises:
        ModelError, NetworkError: it cannot be had.
    """
    path = as_path(name).resolve()
    if path.is_dir():
        return path
    if hub.is_id(hub.split_revision(name)[0]):
        return repository(name).path
    raise ModelError(f"no adapter at {name!r}: give a folder or a Hub id behind the + of {whole!r}")
