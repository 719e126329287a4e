"""A safetensors file beside a recipe: what a part of a plan holds in tensors. Pure.

Among the data of its part it stands as ``file: NAME.KIND.safetensors`` and ``sha256: HEX``. It lies in the recipe's own
folder, goes wherever the recipe goes, and is used only where it is what the recipe names: a recipe may be anybody's.
A kind says what its tensors mean and nothing of the file; `lmprune.models.tensors.tensors_beside` reads them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lmprune.errors import RecipeError, shown
from lmprune.files import lies_in, write_bytes

LARGEST = 1 << 31
"""Bytes of the largest file that is read or fetched."""
KEYS = ("file", "sha256")
"""What the data of a part with such a file hold besides the kind's own."""
INSIDE = "lmprune"
"""The folder within a model's where such a file lies: runtimes take every safetensors file beside the weights for some
of them."""
_LONGEST_NAME = 100


@dataclass(frozen=True)
class Beside:
    """One such file. Two are equal where they hold the same, whatever they are called and wherever they lie.

    Attributes:
        sha256: of the whole file, in hexadecimal.
        file: its plain name.
        folder: where it lies, itself or in `INSIDE`; None where nothing says so.
        held: what it holds, of one that was not written yet.
    """

    sha256: str
    file: str = field(compare=False, repr=False)
    folder: Path | None = field(default=None, compare=False, repr=False)
    held: bytes | None = field(default=None, compare=False, repr=False)

    @classmethod
    def made(cls, content: bytes, kind: str) -> Beside:
        """One in memory, named by what it holds; `copied` writes it."""
        sha256 = hashlib.sha256(content).hexdigest()
        return cls(sha256, f"{sha256[:12]}.{kind}.safetensors", None, content)

    @classmethod
    def read(cls, data: Mapping[str, Any], kind: str, where: str, folder: Path | None) -> Beside:
        """From the data of a part of that kind, in a recipe that lies in ``folder``; the file itself is not opened.

        Raises:
            RecipeError: it is no plain name of such a file, or no hash.
        """
        file, sha256 = data.get("file"), data.get("sha256")
        good = isinstance(file, str) and len(file) <= _LONGEST_NAME
        if not good or not re.fullmatch(rf"[A-Za-z0-9_][\w.-]*\.{kind}\.safetensors", str(file), re.ASCII):
            raise RecipeError(
                f"{where}.file is {shown(file)}; give the plain name of a file beside the recipe, as in "
                f"NAME.{kind}.safetensors"
            )
        if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise RecipeError(f"{where}.sha256 is {shown(sha256)}; give the file's SHA-256 in 64 hexadecimal digits")
        return cls(sha256, str(file), folder)

    @classmethod
    def of(cls, content: bytes, file: str, folder: Path) -> Beside:
        """The file ``file`` in ``folder``, written with ``content``; errors as `lmprune.files.write_bytes`."""
        write_bytes(folder / file, content)
        return cls(hashlib.sha256(content).hexdigest(), file, folder)

    def to_data(self) -> dict[str, str]:
        """For the data of its part."""
        return {"file": self.file, "sha256": self.sha256}

    @property
    def path(self) -> Path:
        """Where it should lie."""
        here = self.folder or Path()
        inside = here / INSIDE / self.file
        return inside if inside.exists() and not (here / self.file).exists() else here / self.file

    def content(self) -> bytes:
        """The file, once it is known to be the one that the recipe names.

        Raises:
            RecipeError: it is missing, too large, a link to somewhere else, or another.
        """
        if self.held is not None:
            return self.held
        path = self.path
        if self.folder is None or not path.exists():
            raise RecipeError(f"the recipe needs {self.file} beside it, and {path} does not exist. Copy it there")
        if not path.is_file() or not lies_in(path, path.parent):
            raise RecipeError(f"{path} is no file of its folder. Put a copy of the file itself there")
        if path.stat().st_size > LARGEST:
            raise RecipeError(f"{path} is larger than {LARGEST >> 20} MiB, which no recipe needs. Nothing was read")
        try:
            with path.open("rb") as file:
                found = file.read(LARGEST + 1)
        except OSError as exc:
            raise RecipeError(f"cannot read {path}: {exc.strerror or exc}") from exc
        if (said := hashlib.sha256(found).hexdigest()) != self.sha256:
            raise RecipeError(
                f"{path} does not fit its recipe: its SHA-256 is {said[:12]}..., and the recipe names "
                f"{self.sha256[:12]}.... Give the file that came with the recipe"
            )
        return found

    def copied(self, folder: Path, *, inside: bool = False) -> Beside:
        """The same in ``folder``, for a recipe there; what lies there under its name and is another stays.

        Where ``folder`` holds weights, or will (``inside``), it goes to `INSIDE`.

        Raises:
            RecipeError, OutputError: it cannot be read, or written.
        """
        for name in (self.file, f"{self.sha256[:12]}.{'.'.join(self.file.rsplit('.', 2)[1:])}"):
            there = replace(self, file=name, folder=folder, held=None)
            if self.folder is not None and there.path.resolve() == self.path.resolve():
                return there
            if not there.path.exists():
                home = folder / INSIDE if inside or any(folder.glob("model*.safetensors")) else folder
                home.mkdir(exist_ok=True)
                Beside.of(self.content(), name, home)
                return there
            if _holds(there):
                return there
        raise RecipeError(f"{there.path} exists and is another file than its name says. Remove it")


def _holds(beside: Beside) -> bool:
    try:
        beside.content()
    except RecipeError:
        return False
    return True


def files_of(parts: Iterable[Any]) -> tuple[Beside, ...]:
    """The files of the parts that have one."""
    return tuple(part.beside for part in parts if part.beside is not None)


def parts_in(parts: Iterable[Any], folder: Path, *, inside: bool = False) -> tuple[Any, ...]:
    """The parts with their files copied to ``folder``; arguments and errors as of `Beside.copied`."""
    return tuple(
        replace(part, beside=part.beside.copied(folder, inside=inside)) if part.beside is not None else part
        for part in parts
    )
