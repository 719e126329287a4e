"""The base folder: a model's own weights under a config repaired for the kept layers, so that plain mergekit is right.

mergekit takes the output's config from ``base_model`` and changes only the layer count, so lists with one entry per
layer stay too long and unknown architectures keep their old count. Given a ``base_model`` whose config is already
that of the pruned model, it writes the right thing. The weights are links: an empty folder would lose routed experts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmprune.errors import OutputError
from lmprune.files import new_folder
from lmprune.models.checkpoint import Checkpoint, read_config
from lmprune.models.companions import check_companions, companions, copy_companions


def write_base_folder(source: Path, config: Mapping[str, Any], out: Path) -> None:
    """Write ``config``, the tokenizer's files and links to the weights of ``source`` to the new folder ``out``.

    A base folder of an earlier recipe in the same place is replaced; any other folder is refused.
    """
    if out.is_dir() and any(out.iterdir()):
        if not is_base_folder(out):
            raise OutputError(f"{out} exists and is no base folder of a recipe. Write the recipe under another name")
        if _is_of(out, source, config):
            return  # a recipe may stand on it, which a kill would leave without
        shutil.rmtree(out)
    weights = Checkpoint.open(source).files
    check_companions(source)
    with new_folder(out) as folder:
        copy_companions(source, folder)
        for file in weights:
            os.symlink(file.resolve(), folder / file.name)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _is_of(folder: Path, source: Path, config: Mapping[str, Any]) -> bool:
    """Whether ``folder`` is what `write_base_folder` would write."""
    links = {file.name: file.resolve() for file in folder.iterdir() if file.is_symlink()}
    return (
        links == {file.name: file.resolve() for file in Checkpoint.open(source).files}
        and read_config(folder) == json.loads(json.dumps(dict(config)))
        and all((folder / file.relative_to(source)).is_file() for file in companions(source))
    )


def is_base_folder(folder: Path) -> bool:
    """Whether the folder's weights are links and nothing else, as `write_base_folder` leaves them."""
    files = list(folder.glob("*.safetensors"))
    return bool(files) and all(file.is_symlink() for file in files)
