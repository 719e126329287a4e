"""Conversations as text, by the tokenizer's chat template.

A template is a program of whoever made the model: its language has no way out of it, but loops and numbers without end.
So it runs in a process of its own (`lmprune.text.rendering`), where time and memory are limited.
"""

from __future__ import annotations

import atexit
import json
import queue
import subprocess
import sys
import threading
from functools import cache
from typing import TYPE_CHECKING, Any

from lmprune.errors import DataError, shown, told_as
from lmprune.quiet import panics_unsaid

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10
"""Of processor time for one conversation."""
_PATIENCE = 300.0
"""Seconds that are waited for the process, which counts its own: on a busy machine these are far more."""


def talk_ids(messages: Any, tokenizer: PreTrainedTokenizerBase, *, ask: bool = False) -> list[int]:
    """The token ids of one conversation.

    Args:
        ask: end with what begins an answer.

    Raises:
        DataError: the template cannot write it, or not in reasonable time and memory.
    """
    from transformers import PreTrainedTokenizerBase

    said = " ".join(str(messages[0].get("content") if isinstance(messages[0], dict) else messages[0])[:200].split())
    what = f"the chat template cannot write the conversation that begins with {shown(said, 40)}"
    with told_as(DataError, what), panics_unsaid():
        if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
            # Not a template but code of the host.
            return list(tokenizer.apply_chat_template(messages, add_generation_prompt=ask, return_dict=False))
        tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        asked = {"template": tokenizer.get_chat_template(), "messages": messages, "ask": ask, "seconds": SECONDS}
        text = _process().ask(asked | {"tokens": tokens})
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class _Process:
    """The process, which is started once and answers line by line."""

    def __init__(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "lmprune.text.rendering"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        atexit.register(self._child.kill)

    def _listen(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._lines.put(line)
        self._lines.put("")

    def ask(self, question: dict[str, Any]) -> str:
        """The text.

        Raises:
            ValueError: there is none.
        """
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(question, default=str) + "\n")
            self._child.stdin.flush()
            line = self._lines.get(timeout=_PATIENCE)
        except (OSError, queue.Empty):
            line = ""
        if not line:
            self._child.kill()
            _process.cache_clear()  # the next conversation gets another
            raise ValueError("it takes too much time or memory, as a template that loops without end does")
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return str(answer["text"])


@cache
def _process() -> _Process:
    return _Process()
