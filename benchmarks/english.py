"""English text that can be had without the Hub: a handbook of our days and novels, from two packages of Debian.

    python -m benchmarks.english OUT.txt        needs apt-get and dpkg-deb

Paragraphs of the Debian Administrator's Handbook (`debian-handbook`; GPL-2+ or CC BY-SA 3.0) and of six novels by Jane
Austen (`r-cran-janeaustenr`; public domain) of 200 characters and more, by turns, until one of the two ends. Prints the
packages' versions and the SHA-256 of what was written.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from html import unescape
from pathlib import Path

PACKAGES = ("debian-handbook", "r-cran-janeaustenr")
LEAST = 200
"""Characters of a paragraph: shorter ones are headings, captions and talk."""


def handbook(root: Path) -> Iterator[str]:
    """Its English paragraphs, page by page."""
    for page in sorted(root.glob("usr/share/doc/debian-handbook/html/en-US/*.html")):
        for found in re.findall(r'<div class="para">(.*?)</div>', page.read_text(encoding="utf-8"), re.DOTALL):
            yield unescape(re.sub(r"<[^>]+>", "", found))


def novels(root: Path) -> Iterator[str]:
    """Paragraphs of all novels: R keeps each as lines, a blank one after a paragraph."""
    packed = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    at = 0
    while at < len(packed):
        # An object: its size, a letter where it is packed by another way than zlib, and the stream.
        unpacking = zlib.decompressobj()
        size = int.from_bytes(packed[at : at + 4], "big")
        data = unpacking.decompress(packed[at + 4 :])
        at = len(packed) - len(unpacking.unused_data)
        if len(data) != size or b"\0\4\0\x09" not in data:
            continue
        # A string of R's serial form: its type and flags, its length, its bytes.
        lines, place = [], 0
        while (place := data.find(b"\0\4\0\x09", place)) >= 0:
            length = int.from_bytes(data[place + 4 : place + 8], "big")
            lines.append(data[place + 8 : place + 8 + length].decode("utf-8", "replace"))
            place += 8 + length
        yield from "\n".join(lines).split("\n\n")


def main(out: Path) -> None:
    """Write the text and say what it is."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True, capture_output=True)
        for package in folder.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, folder / "all"], check=True)
            print(package.name)
        texts = [[" ".join(found.split()) for found in source(folder / "all")] for source in (handbook, novels)]
    pairs = zip(*([text for text in each if len(text) >= LEAST] for each in texts))
    text = "\n\n".join(paragraph for pair in pairs for paragraph in pair) + "\n"
    out.write_text(text, encoding="utf-8")
    print(f"{len(text.split()):,} words, sha256 {hashlib.sha256(text.encode()).hexdigest()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
