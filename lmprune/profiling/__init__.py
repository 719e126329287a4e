"""From a model and tokens to a `Profile`: forward passes whose states are reduced as they appear.

``settings``    what a run can be told                           pure
``batches``     which samples go through the model together      pure
``sequential``  when enough samples have been seen               pure
``journal``     the file from which an interrupted run goes on   pure
``statistics``  states of a batch -> values of each sample
``watching``    states of a live model, by hooks
``streaming``   states of a model that is read layer by layer
``processes``   several processes share the samples
``run``         all of them together
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lmprune.profiling.settings import ProfileSettings as ProfileSettings

if TYPE_CHECKING:
    from lmprune.profiling.run import profile as profile
    from lmprune.profiling.run import profile_model as profile_model

__all__ = ["ProfileSettings", "profile", "profile_model"]


def __getattr__(name: str) -> Any:
    if name in ("profile", "profile_model"):  # they import torch, and `lmprune --help` must not
        return getattr(import_module("lmprune.profiling.run"), name)
    raise AttributeError(f"module 'lmprune.profiling' has no attribute {name!r}")
