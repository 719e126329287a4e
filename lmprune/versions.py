"""Versions of everything that a result depends on. Reads package metadata and imports nothing heavy."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("lmprune", "torch", "transformers", "mergekit", "peft", "lm_eval", "datasets", "bitsandbytes")


def versions() -> dict[str, str]:
    """Package name -> installed version, and Python's own."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
