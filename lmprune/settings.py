"""How a stage's settings are declared: a frozen dataclass whose fields carry their own help. Pure.

The command line makes its options from these fields and the Python API takes the same object, so a type, a default
and a help text each stand in one place.
"""

from __future__ import annotations

import dataclasses
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What ``--dtype`` may say where a model is run as it is."""


def option(default: Any, help: str, *, metavar: str | None = None, flag: str | None = None) -> Any:
    """A dataclass field with a default and a help text; ``flag`` overrides the option's spelling."""
    metadata = {"help": help, "metavar": metavar}
    if flag is not None:
        metadata["flag"] = flag
    return dataclasses.field(default=default, metadata=metadata)
