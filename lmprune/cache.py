"""Where lmprune keeps what it can make again. Its folders may be removed at any time."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """``$LMPRUNE_CACHE``, else ``~/.cache/lmprune``."""
    return Path(os.environ.get("LMPRUNE_CACHE") or Path.home() / ".cache" / "lmprune")
