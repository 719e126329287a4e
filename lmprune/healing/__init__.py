"""Healing: a short training that closes the wound of a cut. The only importer of PEFT's training side.

settings, presets   what is asked for, and published answers         pure
sources             which weights, which cut, which base
blocks              text -> fixed blocks, held-out ones apart
targets, methods    which parameters train
teacher             the unpruned model inside the pruned one
training            transformers.Trainer underneath
writing             merge, prove, write
healing             all of it in order
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmprune.healing.settings import HealSettings as HealSettings

if TYPE_CHECKING:
    from lmprune.healing.run import HealResult as HealResult
    from lmprune.healing.run import heal as heal

__all__ = ["HealResult", "HealSettings", "heal"]


def __getattr__(name: str) -> Any:
    if name in ("heal", "HealResult"):
        from lmprune.healing import run

        return getattr(run, name)
    raise AttributeError(f"module 'lmprune.healing' has no attribute {name!r}")
