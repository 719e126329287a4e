"""What is uploaded: the sdist builds the wheel, which has everything it needs where the source tree is out of sight."""

from __future__ import annotations

import email
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import lmprune

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=240)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of a new environment that holds the wheel; its dependencies come from this one."""
    (wheel,) = built.glob("*.whl")
    assert wheel.stat().st_size < 10_000_000
    home = tmp_path_factory.mktemp("wheel") / "env"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True, timeout=120)
    # After the environment's own packages, so that the wheel's lmprune is found first.
    (site,) = (home / "lib").glob("python*/site-packages")
    here = dict.fromkeys(
        [sysconfig.get_paths()["purelib"], *(folder for folder in sys.path if "site-packages" in folder)]
    )
    (site / "dependencies.pth").write_text("".join(f"{folder}\n" for folder in here))
    return home / "bin"


def _run(bin: Path, *words: str, cwd: Path) -> str:
    done = subprocess.run([str(bin / words[0]), *words[1:]], cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_what_is_uploaded_is_accepted(built: Path) -> None:
    """By the index: metadata that it knows, and a description that it can show."""
    pytest.importorskip("twine")
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, sorted(built.iterdir()))],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr


def test_the_sdist_holds_what_makes_and_tests_it(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as found:
        names = {name.partition("/")[2] for name in found.getnames()}
    for name in ("pyproject.toml", "tests/conftest.py", "docs/index.md", "mkdocs.yml", "CITATION.cff", "LICENSE"):
        assert name in names, name
    assert not [name for name in names if name.startswith((".ci", "build/", ".venv"))]


def test_classifiers_are_known_and_true(built: Path) -> None:
    known = pytest.importorskip("trove_classifiers").classifiers
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as found:
        (metadata,) = [name for name in found.namelist() if name.endswith("METADATA")]
        told = email.message_from_bytes(found.read(metadata))
        names = found.namelist()
    given = told.get_all("Classifier") or []
    assert given and set(given) <= set(known)
    assert ("Typing :: Typed" in given) == ("lmprune/py.typed" in names)
    assert told["Requires-Python"] == ">=3.10" and told["License-Expression"] == "Apache-2.0"
    assert told["Version"] == lmprune.__version__


def test_tasks_recipes_and_model_are_inside(installed: Path, tmp_path: Path) -> None:
    site = installed.parent
    assert "lmprune" in _run(installed, "lmprune", "--help", cwd=tmp_path)
    for words in (("lmprune", "tasks"), ("lmprune", "demo", "--where")):
        found = Path(_run(installed, *words, cwd=tmp_path).strip())
        assert found.is_relative_to(site) and found.is_dir()
    code = "import lmprune, pathlib; print(pathlib.Path(lmprune.__file__).parent / 'recipes')"
    recipes = Path(_run(installed, "python", "-c", code, cwd=tmp_path).strip())
    assert list(recipes.glob("*.yml")), recipes


@pytest.mark.slow
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
