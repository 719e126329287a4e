"""The wheel, installed where the source tree is out of sight, has everything it needs."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of a new environment that holds the wheel; its dependencies come from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    assert wheel.stat().st_size < 10_000_000
    home = folder / "env"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True, timeout=120)
    # After the environment's own packages, so that the wheel's lmprune is found first.
    (site,) = (home / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return home / "bin"


def _run(bin: Path, *words: str, cwd: Path) -> str:
    done = subprocess.run([str(bin / words[0]), *words[1:]], cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_tasks_recipes_and_model_are_inside(installed: Path, tmp_path: Path) -> None:
    site = installed.parent
    for words in (("lmprune", "tasks"), ("lmprune", "demo", "--where")):
        found = Path(_run(installed, *words, cwd=tmp_path).strip())
        assert found.is_relative_to(site) and found.is_dir()
    code = "import lmprune, pathlib; print(pathlib.Path(lmprune.__file__).parent / 'recipes')"
    recipes = Path(_run(installed, "python", "-c", code, cwd=tmp_path).strip())
    assert list(recipes.glob("*.yml")), recipes


def test_the_literal_command_runs_our_tasks_on_our_recipe(installed: Path, tmp_path: Path) -> None:
    tasks = _run(installed, "lmprune", "tasks", cwd=tmp_path).strip()
    recipe = Path(tasks).parent / "recipes" / "demo-minus-3-deepest.yml"
    words = ("-m", "lm_eval", "--model", "lmprune", "--model_args", f"pretrained=demo,recipe={recipe}")
    out = _run(
        installed,
        "python",
        *words,
        "--tasks",
        "lmprune_demo_facts",
        "--include_path",
        tasks,
        "--limit",
        "8",
        cwd=tmp_path,
    )
    assert "lmprune_demo_facts" in out
