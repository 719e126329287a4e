"""From what a user calls a model to a folder on this machine: the word ``demo``, a path, a Hub id, or BASE+ADAPTER."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from lmprune.errors import ModelError, NetworkError, RecipeError
from lmprune.models.converted import from_pickles, has_only_pickles

DEMO = "demo"
WANTED_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py")
"""What is fetched from the Hub: config, weights, tokenizer; custom code is read only when it is asked for."""


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk. ``name`` is what recipes and reports call it; ``revision`` is the Hub commit, if any.

    ``converted`` says that ``path`` holds weights made from those of that name: pickles, or a base and an adapter.
    """

    path: Path
    name: str
    revision: str | None = None
    converted: bool = False


def demo_folder() -> Path:
    """The folder of the embedded demo model."""
    return Path(__file__).resolve().parent.parent / "demo" / "model"


def locate(model: str, revision: str | None = None, *, allow_pickle: bool = False) -> ModelFolder:
    """Find ``model``, fetching it from the Hub when it is neither ``demo`` nor a folder.

    ``BASE+ADAPTER``, as mergekit spells it, is the base with a LoRA adapter merged into it. With ``allow_pickle``,
    weights that are there only as pickles are converted.

    Raises:
        ModelError: there is no such folder, and no such repository.
        NetworkError: it looks like a Hub id but the Hub cannot be reached.
    """
    if "+" in model and not Path(model).expanduser().exists():
        return _with_adapter(model, allow_pickle)
    found = _find(model, revision, allow_pickle)
    if allow_pickle and has_only_pickles(found.path):
        return replace(found, path=from_pickles(found.path), converted=True)
    return found


def _find(model: str, revision: str | None, allow_pickle: bool) -> ModelFolder:
    if model == DEMO:
        return ModelFolder(demo_folder(), DEMO)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{model} holds no config.json, so it is not a model folder")
        return ModelFolder(path.resolve(), str(path.resolve()))
    if path.exists():
        raise ModelError(
            f"{model} is a file. Give a model's folder, a Hub id such as Qwen/Qwen3-0.6B, or the word demo"
        )
    if not _is_hub_id(model):
        raise ModelError(f"no model at {model!r}: give a folder, a Hub id such as Qwen/Qwen3-0.6B, or the word demo")
    return _from_hub(model, revision, allow_pickle)


def _with_adapter(model: str, allow_pickle: bool) -> ModelFolder:
    """The base of ``BASE+ADAPTER``, or of ``BASE@REVISION+ADAPTER``, with the adapter merged."""
    from lmprune.adapters import merged_folder

    base_name, _, adapter_name = model.rpartition("+")
    name, revision = base_name, None
    if not Path(base_name).expanduser().is_dir():
        name, _, revision = base_name.partition("@")
    base = locate(name, revision or None, allow_pickle=allow_pickle)
    adapter = Path(adapter_name).expanduser().resolve()
    if adapter.is_dir():
        adapter_name = str(adapter)
    elif _is_hub_id(adapter_name):
        adapter = _from_hub(adapter_name, None, False).path
    else:
        raise ModelError(f"no adapter at {adapter_name!r}: give a folder or a Hub id behind the + of {model!r}")
    pinned = f"{base.name}@{base.revision}" if base.revision else base.name
    return ModelFolder(merged_folder(base.path, adapter), f"{pinned}+{adapter_name}", converted=True)


def locate_recipe(recipe: str) -> Path:
    """The recipe's file: a path here, or the ``recipe.yml`` of a Hub repository.

    Raises:
        RecipeError: there is neither.
        NetworkError: it looks like a Hub id but the Hub cannot be reached.
    """
    path = Path(recipe).expanduser()
    if path.exists() or not _is_hub_id(recipe) or path.suffix in (".yml", ".yaml"):
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(recipe, "recipe.yml"))
    except LocalEntryNotFoundError as exc:
        raise NetworkError(
            f"no recipe {recipe!r} here, and the Hugging Face Hub cannot be reached to fetch it"
        ) from exc
    except (RepositoryNotFoundError, EntryNotFoundError) as exc:
        raise RecipeError(f"no recipe {recipe!r} here, and no recipe.yml in a Hub repository of that name") from exc
    except OSError as exc:
        raise NetworkError(f"the Hugging Face Hub cannot be reached to fetch {recipe!r}. Check the network") from exc


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def _from_hub(model: str, revision: str | None, allow_pickle: bool) -> ModelFolder:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        path = Path(snapshot_download(model, revision=revision, allow_patterns=list(WANTED_FILES)))
        if allow_pickle and not any(path.glob("*.safetensors")):
            path = Path(snapshot_download(model, revision=revision, allow_patterns=[*WANTED_FILES, "*.bin"]))
    except GatedRepoError as exc:
        raise ModelError(f"{model} is gated on the Hub: accept its terms there, then run `hf auth login`") from exc
    except RevisionNotFoundError as exc:
        raise ModelError(f"{model} has no revision {revision!r} on the Hub") from exc
    except RepositoryNotFoundError as exc:
        raise ModelError(f"no folder {model!r} here, and no such model on the Hub (or no access to it)") from exc
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as exc:
        raise NetworkError(
            f"{model!r} is no folder here, and the Hugging Face Hub cannot be reached to fetch it. "
            "Check the network, or give a local folder"
        ) from exc
    return ModelFolder(path, model, path.name if re.fullmatch(r"[0-9a-f]{40}", path.name) else revision)
