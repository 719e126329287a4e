"""What docs/python.md shows runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^(<!-- slow -->\n)?```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(*, slow: bool) -> str:
    found = [code for mark, code in BLOCK.findall((DOCS / "python.md").read_text(encoding="utf-8")) if slow or not mark]
    assert len(found) > 3
    return "\n".join(found)


def run(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_examples_run(tmp_path: Path) -> None:
    out = run(blocks(slow=False), tmp_path)
    assert "<Profile of demo: 12 layers, 32 samples of demo>" in out
    assert "drops 2 of 12 layers" in out and "did you mean 'angular'" in out
    assert (tmp_path / "healed" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_longer_examples_run(tmp_path: Path) -> None:
    run(blocks(slow=True), tmp_path)
    assert (tmp_path / "report.html").is_file()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    notebook: Any = nbformat.read(DOCS / "python.ipynb", as_version=4)
    client.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    assert any("text/html" in out.get("data", {}) for out in shown), "a choice is shown as a picture of its layers"
    assert any("image/png" in out.get("data", {}) for out in shown), "a profile is shown as a map"
