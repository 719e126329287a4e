"""Printing: results go to stdout, progress and remarks to stderr."""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def result(text: str, data: Any, as_json: bool) -> None:
    """Print ``data`` as JSON where a program reads it, ``text`` otherwise; of several processes, the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(data, indent=2, ensure_ascii=False) if as_json else text)


def remark(text: str) -> None:
    """A line for the person who waits."""
    print(text, file=sys.stderr, flush=True)


def size(count: float) -> str:
    """Bytes for people: ``4.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
