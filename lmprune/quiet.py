"""Keep the hosts' import-time chatter from the users of our commands; real warnings pass.

Called by the command line before any host is imported. Importing lmprune as a library changes nothing.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lmprune.errors import is_panic

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


@contextmanager
def no_load_report() -> Iterator[None]:
    """Within the block transformers does not print which tensors do not fit; the caller says so in one line."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


@contextmanager
def panics_unsaid() -> Iterator[None]:
    """Within the block, what is written to stderr waits for its end, and goes where a host panicked.

    Rust's hosts print a panic themselves, in lines of their own, before Python has anything of it.
    """
    if (before := _held_back()) is None:
        yield
        return
    said = True
    try:
        yield
    except BaseException as exc:
        said = not is_panic(exc)
        raise
    finally:
        _flush()
        os.dup2(before, 2)
        os.close(before)
        _say(said)


_holding: list[int] = []
"""What stderr is meanwhile: a file without a name, made once, since a tokenizer is asked thousands of times."""


def _held_back() -> int | None:
    """Where stderr leads by itself, once it is held back; None where it is already, or there is none."""
    _flush()
    with suppress(OSError):
        before = os.dup(2)
        if not _holding:
            with tempfile.TemporaryFile() as file:
                _holding.append(os.dup(file.fileno()))
        if not os.path.sameopenfile(before, _holding[0]):
            os.dup2(_holding[0], 2)
            return before
        os.close(before)
    return None


def _say(said: bool) -> None:
    """Empty what was held back, on stderr or nowhere."""
    held = _holding[0]
    if size := os.fstat(held).st_size:
        os.lseek(held, 0, os.SEEK_SET)
        text = os.read(held, size)
        os.ftruncate(held, 0)
        os.lseek(held, 0, os.SEEK_SET)
        if said:
            with suppress(OSError):
                os.write(2, text)


def _flush() -> None:
    with suppress(AttributeError, ValueError, OSError):  # there is none, or it is closed
        sys.stderr.flush()
