"""The files that belong to a model besides weights and config: one list for all who read, copy or fetch them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lmprune.errors import ModelError, told_as
from lmprune.files import LARGEST, lies_in, read_json, read_text

if TYPE_CHECKING:
    from transformers import GenerationConfig

TEXT = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "additional_chat_templates/*.jinja")
"""Tokenizer, chat templates, generation config, processors."""
LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
CODE = ("*.py",)
"""The model's own classes, which run only where they are trusted."""
WANTED = (*TEXT, *LEGAL, *CODE, "*.safetensors", "recipe.yml")
"""What is fetched from the Hub. Code comes with the rest, since a snapshot is fetched once; nothing reads it."""
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
"""Any of these says that there is a tokenizer."""
_MAPPINGS = (
    "*_config.json",
    "tokenizer.json",
    "vocab.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)
"""Which of them hosts read as one object of JSON."""
GENERATION = "generation_config.json"
_AGAIN = "Download it again, or remove it"
_OTHERS = ("config.json", "*.index.json", "adapter_config.json", "lmprune.json", "mergekit_config.yml")


def companions(folder: Path, *, code: bool = False) -> Iterator[Path]:
    """The companions in ``folder``, each once; Python files only where ``code`` is trusted.

    Raises:
        ModelError: one is no regular file, or a link to somewhere else.
    """
    found: set[Path] = set()
    for pattern in (*TEXT, *LEGAL, *(CODE if code else ())):
        for file in sorted(folder.glob(pattern)):
            check_regular(file)
            if file.is_file() and file not in found and not any(file.match(other) for other in _OTHERS):
                if not lies_in(file, folder):
                    raise ModelError(f"{file} is a link out of the model's folder. Put a copy of the file in its place")
                found.add(file)
                yield file


def check_companions(folder: Path, *, code: bool = False) -> None:
    """Read the companions of ``folder``, so that what no host could read of a copy is refused before it is written.

    Raises:
        ModelError: one is no regular file, a link to somewhere else, or not what it is called.
    """
    for file in companions(folder, code=code):
        if file.suffix == ".json":
            data = read_json(file, ModelError, _AGAIN)
            if not isinstance(data, dict) and any(file.match(name) for name in _MAPPINGS):
                raise ModelError(f"{file} is not a JSON object. {_AGAIN}")
        elif file.suffix == ".jinja":
            read_text(file, ModelError, _AGAIN)
    generation_config(folder)


def generation_config(folder: Path) -> GenerationConfig | None:
    """How text is drawn from the model in ``folder`` by default; None where it does not say.

    Raises:
        ModelError: its file cannot be read.
    """
    from transformers import GenerationConfig

    if not (folder / GENERATION).is_file():
        return None
    with told_as(ModelError, f"{folder / GENERATION} cannot be read"):
        found: GenerationConfig = GenerationConfig.from_pretrained(folder)
        return found


def check_regular(file: Path) -> None:
    """Refuse what stands where a model's small files stand, and is none.

    Raises:
        ModelError: it is a pipe or a device, or far too large.
    """
    if file.exists() and not file.is_file() and not file.is_dir():
        raise ModelError(f"{file} is no regular file, and stands where a model's files stand. Remove it")
    if file.is_file() and file.stat().st_size > LARGEST:
        raise ModelError(f"{file} is larger than {LARGEST >> 20} MiB, which no such file of a model is. Remove it")


def copy_companions(folder: Path, out: Path, *, code: bool = False) -> list[str]:
    """Copy them as they are, byte for byte.

    Returns:
        The names copied, sorted.
    """
    names = []
    for file in companions(folder, code=code):
        name = file.relative_to(folder)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, out / name)
        names.append(str(name))
    return sorted(names)
