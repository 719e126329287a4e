"""What must not leave this machine: its paths, its user's name, tokens. Looked for in all that is pushed, pictures too.

Names of folders that the files are known to hold are first put into words that hold anywhere (`Names`); what is found
after that stops the push.
"""

from __future__ import annotations

import getpass
import json
import re
import socket
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lmprune.errors import OutputError, shown

TEXT = (".md", ".yml", ".yaml", ".json", ".txt", ".jinja", ".html", ".svg", ".model", ".py")
_TOKENS = re.compile(
    r"\b(hf|api_org|github_pat|ghp|sk)_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9]{20,}|Bearer [A-Za-z0-9._-]{16,}"
)
_PATHS = re.compile(
    r"(?<![\w/.:-])(/(home|Users|root|tmp|mnt|media|var|opt|workspace|scratch)/[^\s\"'`<>|,;)]*)|\b[A-Z]:\\\w+"
)
_ANY_PATH = re.compile(r"(?<![\w/.:<+=~\\-])/(?:[\w.+-]+/)+[\w.+-]*")
"""Whatever begins at the root; in files of others, such as licences and templates, it may be anything."""
_WRITTEN = (".md", ".yml", ".yaml", ".png")
"""Kinds of files that lmprune writes."""
_PUBLIC = frozenset({"root", "user", "admin", "ubuntu", "model", "models", "data", "demo", "test", "runner", "guest"})
"""Names that say nothing of a person, and that ordinary text holds."""
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "tekken.json")
"""Files of the base's that hold pieces of any text there is: of these only what is known to be ours counts."""
_LONGEST_HEADER = 1 << 26


@dataclass(frozen=True)
class Names:
    """Folders of this machine, and what others call what lies in them."""

    known: Mapping[str, str]

    def clean(self, text: str) -> str:
        """``text`` with every known folder by its other name, the longest first."""
        for folder in sorted(self.known, key=len, reverse=True):
            text = re.sub(rf"{re.escape(folder)}(?![\w.-])", lambda _, name=self.known[folder]: name, text)  # type: ignore[misc]
        return text


def check(folder: Path, tokens: tuple[str, ...] = (), allowed: tuple[str, ...] = ()) -> None:
    """Refuse to go on where a file of ``folder`` tells of this machine.

    Args:
        tokens: secrets that are known, whatever they look like.
        allowed: names that may stand in it although they are the user's here: the repository's owner.

    Raises:
        OutputError: naming the file and what stands in it; of a token, no part.
    """
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        for text in (name, *texts(file)):
            vocabulary = any(file.match(pattern) for pattern in _VOCABULARIES)
            if any(token and token in text for token in tokens) or (not vocabulary and _TOKENS.search(text)):
                raise OutputError(f"{name} holds what looks like a token. Nothing was pushed: remove it and revoke it")
            if (found := _ours(text) if vocabulary else leak(text, allowed)) is None and file.suffix in _WRITTEN:
                found = match[0] if (match := _ANY_PATH.search(text)) else None
            if found is not None:
                raise OutputError(
                    f"{name} holds {shown(found)}, which tells of this machine. Nothing was pushed: remove it, or "
                    "give the base's name on the Hub by --base"
                )


def leak(text: str, allowed: tuple[str, ...] = ()) -> str | None:
    """The first path, user's name or host's name of this machine in ``text``."""
    if found := _PATHS.search(text):
        return found[0]
    if (own := _ours(text)) is not None:
        return own
    for name in (_user(), socket.gethostname()):
        public = name.lower() in (*_PUBLIC, *(other.lower() for other in allowed))
        if len(name) > 3 and not public and re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text):
            return name
    return None


def _ours(text: str) -> str | None:
    """The first folder of this very process in ``text``."""
    own = (str(Path.home()), str(Path.cwd()), tempfile.gettempdir())
    return next((folder for folder in own if len(folder) > 5 and folder in text), None)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no such entry, as in containers
        return ""


def texts(file: Path) -> Iterator[str]:
    """Whatever a file says in words: of a picture and of tensors, their metadata."""
    if file.suffix == ".png":
        yield from _png_texts(file.read_bytes())
    elif file.suffix == ".safetensors":
        yield _header(file)
    elif file.suffix in TEXT or file.stat().st_size < 1 << 20:
        yield file.read_bytes().decode("utf-8", "replace")


def _png_texts(data: bytes) -> Iterator[str]:
    """The text chunks of a PNG file, unpacked (https://www.w3.org/TR/png/#11textinfo)."""
    at = 8
    while at + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        at += size + 12
        if kind in (b"tEXt", b"eXIf"):
            yield body.decode("latin-1")
        elif kind == b"zTXt":
            word, _, packed = body.partition(b"\0")
            yield word.decode("latin-1") + " " + _unpacked(packed[1:])
        elif kind == b"iTXt":
            word, _, rest = body.partition(b"\0")
            text = rest[2:].split(b"\0", 2)[-1] if len(rest) > 2 else b""
            yield (
                word.decode("latin-1")
                + " "
                + (_unpacked(text) if rest[:1] == b"\1" else text.decode("utf-8", "replace"))
            )


def _unpacked(packed: bytes) -> str:
    try:
        return zlib.decompressobj().decompress(packed, 1 << 20).decode("utf-8", "replace")
    except zlib.error:
        return ""


def _header(file: Path) -> str:
    """What a safetensors file says besides its tensors' places."""
    with file.open("rb") as handle:
        start = handle.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        header = json.loads(handle.read(size)) if 0 < size < _LONGEST_HEADER else {}
    return json.dumps(header.get("__metadata__", {}))
