"""Healing: what closes the wound of a cut, by training or by a closed form.

settings, presets   what is asked for, and published answers; facts that they depend on   pure
methods             what can be done, a file each                     pure until it is done
student, targets    the live cut model, and where LoRA sits in it
reading, self_data  text -> blocks, held-out ones apart
learning            the method at work: training, repairing underneath
training            transformers.Trainer with our loss
teacher             the unpruned model inside the pruned one
repairing           what a closed form works on
refitting, replaceme, scaling, streamlining    the closed forms themselves
layerwise, writers, experts, norms, solving    a layer at a time: where it writes, and the regressions
keeping, one_by_one                            what was solved so far; models larger than memory
writing             merge, prove, write
run                 all of it in order
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
