"""From a model and tokens to a `Profile`: forward passes whose states are reduced as they appear.

``settings``    what a run can be told                           pure
``sequential``  when enough samples have been seen               pure
``distances``   the `Profile`, and how sure it is                pure
``statistics``  states of a batch -> values of each sample
``sizes``       how much goes through the model at once
``measuring``   the values of batches, of a model in memory or streamed
``task``        what is to be measured, and the profile that its values make
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
