"""Where the task definitions lie. Pure."""

from __future__ import annotations

from pathlib import Path


def tasks_folder() -> Path:
    """Our tasks: inside the package when installed, at the top of a source tree otherwise.

    >>> (tasks_folder() / "demo").is_dir()
    True
    """
    package = Path(__file__).resolve().parent
    installed = package / "tasks"
    return installed if installed.is_dir() else package.parent / "tasks"
