"""Regular expressions from files that others wrote: tried apart, for a few seconds, before a host runs them here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable

from lmprune.errors import ModelError, shown

SECONDS = 5.0
_TRIAL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.fullmatch(pattern, name)
        re.match(rf"(.*\\\\.)?({pattern})$", name)
"""
"""Both ways in which PEFT matches the names of modules."""


def check_patterns(patterns: Iterable[str], names: Iterable[str], where: str) -> None:
    """Refuse what takes longer than `SECONDS` to match against ``names``: a few letters may ask for years.

    Raises:
        ModelError: one is too slow, or no regular expression; ``where`` names the file.
    """
    special = sorted({pattern for pattern in patterns if not pattern.replace("_", "").replace(".", "").isalnum()})
    if not special:
        return
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _TRIAL],
            input=json.dumps([special, sorted(names)]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as exc:
        raise ModelError(
            f"{where}: matching {shown(special[0])} takes too long. Name the modules as a list instead"
        ) from exc
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it cannot be matched"])[-1]
        raise ModelError(f"{where}: {shown(special[0])} is no regular expression: {shown(said)}")
