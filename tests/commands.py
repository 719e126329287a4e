"""Commands as a user runs them, in processes that need not import the hosts again: one has, and forks for each.

Run as a script it is that process: for each line of JSON on stdin it runs a command and answers with its exit code.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

LONGEST = 1800
"""Seconds that a command may take, on a machine that does other work too."""


class Commands:
    """Runs ``lmprune`` with words, in a folder: what `subprocess.run` gives for the installed command."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def __call__(self, words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
        if self._server is None:
            self._server = subprocess.Popen([sys.executable, __file__], stdin=-1, stdout=-1, text=True)
        assert self._server.stdin is not None and self._server.stdout is not None
        with tempfile.TemporaryDirectory() as scratch:
            out, err = Path(scratch) / "out", Path(scratch) / "err"
            asked = {"words": words, "folder": str(folder), "environment": {**os.environ}, "to": [str(out), str(err)]}
            print(json.dumps(asked), file=self._server.stdin, flush=True)
            code = int(self._server.stdout.readline())
            return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())

    def close(self) -> None:
        """End the process that forks."""
        if self._server is not None:
            self._server.communicate()


def _serve() -> None:
    import lmprune.demo.walk
    import lmprune.evaluation.harness
    import lmprune.healing.run
    import lmprune.sweeping.run  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if not child:
            _be(asked)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _be(asked: dict[str, Any]) -> NoReturn:
    """The command, from the first line of its main function on."""
    code = 70
    try:
        signal.alarm(LONGEST)
        os.chdir(asked["folder"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        tempfile.tempdir = None
        for place, path in enumerate(asked["to"], 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), place)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, "w" if n else "r", closefd=False) for n in range(3))
        sys.argv = ["lmprune", *asked["words"]]
        from lmprune.cli import main

        main()
    except SystemExit as exc:
        code = int(exc.code or 0)
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
