"""Makes ``lm_eval --model lmprune`` work on lm-eval releases that do not discover plugins.

torch calls `register` at the end of its own import (entry-point group ``torch.backends``), and lm-eval imports torch
before it looks up the model. This file stands alone at the top level, under a name nobody else uses, and can raise
nothing: ``import torch`` must never fail because of it, not even when lmprune itself has moved away.
"""

from __future__ import annotations

import sys

TARGET = "lmprune.evaluation.plugin:LmpruneLM"


def register() -> None:
    """Add a lazy entry for our model to lm-eval's registry, if lm-eval is running and has no discovery of its own."""
    if "lm_eval" not in sys.modules:
        return
    try:
        from importlib.util import find_spec

        from lm_eval.api import registry

        if hasattr(registry, "load_plugins") or find_spec("lmprune") is None:
            return
        # Importing this registers lm-eval's own models, which it does by itself only while its registry is empty.
        import lm_eval.models  # noqa: F401

        if "lmprune" not in registry.model_registry:
            registry.model_registry.register("lmprune", target=TARGET)
    except Exception:  # a failure here would be a failure of `import torch`
        return
