"""From a live model to a folder: its own weights and config, and the files of the model that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmprune.errors import OutputError, told_as
from lmprune.models.companions import GENERATION, copy_companions
from lmprune.models.rotary import name_rotary


def save_beside(model: Any, source: Path, folder: Path, *, code: bool = False) -> None:
    """Write ``model`` to ``folder``, with the companions of ``source`` as they are.

    Raises:
        OutputError: it cannot be written.
    """
    from transformers import GenerationConfig

    if (source / GENERATION).is_file():
        # It is copied as it is: transformers refuses to save some that it has itself loaded, as Llama 2's.
        model.generation_config = GenerationConfig()
    with told_as(OutputError, f"cannot write {folder}"):
        model.save_pretrained(folder)
        name_rotary(folder)
        copy_companions(source, folder, code=code)
