"""``python -m lmprune.text.rendering``: chat templates rendered apart from everything else; see `lmprune.text.talks`.

One JSON object a line in, one out. Time and memory of each are limited where the system can limit them.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from lmprune.errors import line_of

MEMORY = 2 << 30
"""Bytes besides what the host takes."""
LONGEST = 1 << 25
"""Characters of one conversation."""


def main() -> None:
    """Answer until the end of the input."""
    from transformers.utils.chat_template_utils import render_jinja_template

    out = sys.stdout
    sys.stdout = sys.stderr  # whatever else is printed is no answer
    _limit_memory()
    for line in sys.stdin:
        asked = json.loads(line)
        _limit_time(asked["seconds"])
        try:
            answer = {"text": _rendered(render_jinja_template, asked)}
        except (Exception, RecursionError, MemoryError) as exc:
            answer = {"error": line_of(exc)}
        out.write(json.dumps(answer) + "\n")
        out.flush()


def _rendered(render: Any, asked: dict[str, Any]) -> str:
    (text,), _ = render(
        [asked["messages"]], chat_template=asked["template"], add_generation_prompt=asked["ask"], **asked["tokens"]
    )
    if len(text) > LONGEST:
        raise ValueError(f"it makes {len(text):,} characters of one conversation")
    return str(text)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    import psutil

    most = psutil.Process().memory_info().vms + MEMORY
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _limit_time(seconds: int) -> None:
    """Let the next conversation have so many; the system ends the process after them."""
    try:
        import resource
    except ImportError:
        return
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    most = int(time.process_time()) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    main()
