"""From a sweep's folder to what people look at.

``collect``   the folder's files, checked against one another     pure
``words``     tables and plain sentences                          pure
``healings``  what repairs and trainings say of themselves        pure
``pictures``  what is drawn, by `lmprune.drawing`
``page``      one HTML file, by Jinja; and report.md with PNGs
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmprune.reporting.page import report as report

__all__ = ["report"]


def __getattr__(name: str) -> Any:
    if name == "report":
        return import_module("lmprune.reporting.page").report
    raise AttributeError(f"module 'lmprune.reporting' has no attribute {name!r}")
