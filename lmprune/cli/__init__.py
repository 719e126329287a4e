"""The command line: one thin command per stage. An `LmpruneError` becomes one line on stderr and an exit code.

Exit codes: 0 done, 1 a mistake that the message explains, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys

from lmprune.errors import LmpruneError, is_panic, shown

DEBUG = "LMPRUNE_DEBUG"
"""The environment variable that shows tracebacks."""


def main() -> None:
    """Run the command line and leave with its exit code."""
    try:
        # Imported here, and what a command needs within it, so that an interruption is one line from the start.
        from lmprune.cli.app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = _fail("interrupted", 130)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes
        code = 1
    except LmpruneError as exc:
        if os.environ.get(DEBUG):
            raise
        code = _fail(str(exc), exc.exit_code)
    except BaseException as exc:
        if os.environ.get(DEBUG) or not (isinstance(exc, Exception) or is_panic(exc)):
            raise
        code = _fail(_of_the_system(exc) or _unexpected(exc), 1)
    sys.exit(code)


def _of_the_system(exc: BaseException) -> str | None:
    """What the system says of a file that somebody named, whichever call it was that met it; None of other errors."""
    if not isinstance(exc, OSError) or exc.errno not in _REFUSALS:
        return None
    if exc.errno in _FULL and exc.filename is None:  # whoever writes into an open file is not told its name
        return f"{exc.strerror}. Make room, and run the command again"
    if not isinstance(exc.filename, (str, bytes)):
        return None
    return f"{shown(os.fsdecode(exc.filename))}: {exc.strerror}. Mend that, or give another file or folder"


_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP} | _FULL
"""Errors that are never ours; of a file that is missing or a folder that should be one, the code should know."""


def _unexpected(exc: BaseException) -> str:
    said = " ".join(str(exc).split())[:300]
    return f"unexpected {type(exc).__name__}{': ' * bool(said)}{said}. Set {DEBUG}=1 to see where, and report it"


def _fail(line: str, code: int) -> int:
    # What a message names may come from a stranger's file: no terminal should obey it.
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)
    print(f"lmprune: {line}", file=sys.stderr)
    return code
