"""Keep the hosts' import-time chatter from the users of our commands; real warnings pass.

Called by the command line before any host is imported. Importing lmprune as a library changes nothing.
"""

from __future__ import annotations

import logging
import os
import warnings

_NOISE = (
    "Failed to load CPU gemm_4bit_forward",
    "MatMul8bitLt: inputs will be cast",
    "Reduce-op SUM is not supported",
    "`torch_dtype` is deprecated",
    "The following generation flags are not valid",
    "Merge: no tokenizer",
    "NOTE: Redirects are currently not supported",
    "Setting `pad_token_id` to `eos_token_id`",
)


class _DropNoise(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not any(noise in record.getMessage() for noise in _NOISE)


def quiet_hosts() -> None:
    """Silence known import-time noise: bitsandbytes' missing kernels, weight-loading bars, deprecations."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    noise = _DropNoise()
    for name in (
        "bitsandbytes",
        "bitsandbytes.backends.cpu.ops",
        "bitsandbytes.backends.utils",
        "bitsandbytes.autograd._functions",
        "mergekit",
        "lm_eval",
    ):
        logging.getLogger(name).addFilter(noise)


def quiet_bars() -> None:
    """Turn off transformers' weight-loading bars; called after transformers is imported."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
