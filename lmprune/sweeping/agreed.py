"""How often the points of a sweep still say what the whole model says, and their loss on that text. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmprune.errors import RecipeError, line_of
from lmprune.files import read_json, write_json

FILE = "agreement.json"
FORMAT, VERSION = "lmprune-agreement", 1


@dataclass(frozen=True)
class Agreed:
    """One point on the text.

    Attributes:
        same, same_stderr: share of next tokens that it says as the whole model does, and its standard error.
        loss, loss_stderr: nats a token, and its standard error; samples are drawn, not single tokens.
    """

    same: float
    same_stderr: float
    loss: float
    loss_stderr: float

    @property
    def same_text(self) -> str:
        """``93.1 ± 0.4 %``."""
        return f"{100 * self.same:.1f} ± {100 * self.same_stderr:.1f} %"

    @property
    def loss_text(self) -> str:
        """``0.516 ± 0.004``."""
        return f"{self.loss:.3f} ± {self.loss_stderr:.3f}"


@dataclass(frozen=True)
class Agreements:
    """``agreement.json`` of a run folder.

    Attributes:
        source, hash, tokens, samples: the text, and how much of it was predicted.
        points: by name.
    """

    source: str
    hash: str
    tokens: int
    samples: int
    points: Mapping[str, Agreed]

    def write(self, folder: Path) -> None:
        """Into the run folder."""
        write_json(folder / FILE, {"format": FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> Agreements | None:
        """Of a run folder; None where nothing was measured.

        Raises:
            RecipeError: the file is another.
        """
        path, remedy = folder / FILE, "Remove it and run the sweep again"
        try:
            data = read_json(path, RecipeError, remedy)
        except FileNotFoundError:
            return None
        try:
            if (data["format"], data["version"]) != (FORMAT, VERSION):
                raise ValueError(f"format {str(data['format'])[:40]!r}")
            points = {str(name): _agreed(values) for name, values in data["points"].items()}
            words = [data[name] for name in ("source", "hash")]
            counts = [data[name] for name in ("tokens", "samples")]
            if not all(type(word) is str for word in words) or not all(type(count) is int for count in counts):
                raise ValueError("its text")
            return cls(words[0], words[1], counts[0], counts[1], points)
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise RecipeError(f"{path} says nothing of agreement ({line_of(exc, 80)}). {remedy}") from exc


def _agreed(values: Mapping[str, Any]) -> Agreed:
    found = {name: values[name] for name in Agreed.__dataclass_fields__}
    for name, value in found.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{name} is no number")
    return Agreed(**found)
