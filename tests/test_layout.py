"""The house: imports run downwards, hosts are imported in one place each, pure modules stay pure."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = Path(__file__).parent.parent / "lmprune"
FILES = {
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}

# Lower floors may not import higher ones, and rooms on the floor of the stages may not import one another.
BOTTOM = {"errors", "settings", "plan", "files", "versions", "quiet", "tasks_folder"}
MIDDLE = {
    "recipe",
    "profiles",
    "models",
    "calibration",
    "criteria",
    "merge",
    "base_folder",
    "copying",
    "verify",
    "support",
    "adapters",
}
STAGES = {"profiling", "choosing", "pruning", "heal", "evaluation", "bench", "plotting"}
TOP = {"demo", "cli", "report", "sweep"}


def _imports(file: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in it; type-checking imports too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports in full"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _rooms(file: Path) -> set[str]:
    return {name.split(".")[1] for name in _imports(file) if name.startswith("lmprune.") and name.count(".") >= 1}


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", FILES)
def test_imports_run_downwards(module: str) -> None:
    room, used = _room(module), _rooms(FILES[module]) - {_room(module), "__version__"}
    if module in ("lmprune", "lmprune.__main__"):
        return
    if module.startswith("lmprune.text.world"):
        assert not used
    elif room in BOTTOM:
        assert used <= BOTTOM
    elif room in MIDDLE:
        assert used <= BOTTOM | MIDDLE | ({"demo"} if room == "calibration" else set())
    elif room in STAGES:
        assert used <= BOTTOM | MIDDLE
    else:
        assert room in TOP, f"say on which floor {room} stands"


@pytest.mark.parametrize(
    ("host", "rooms"),
    [("mergekit", {"merge"}), ("lm_eval", {"evaluation"}), ("peft", {"adapters", "heal"})],
)
def test_each_host_is_imported_in_one_place(host: str, rooms: set[str]) -> None:
    users = {
        _room(m) for m, file in FILES.items() if any(n == host or n.startswith(host + ".") for n in _imports(file))
    }
    assert users <= rooms


PURE = [m for m in FILES if _room(m) in {*BOTTOM, "recipe", "profiles", "criteria"}] + [
    "lmprune.models.checkpoint",
    "lmprune.models.fields",
]


def test_pure_modules_and_the_help_import_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'peft', 'lm_eval', 'mergekit', 'datasets', 'matplotlib'} & set(sys.modules)"
    code = f"import sys\nimport {', '.join(PURE)}, lmprune.cli\nassert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_public_names_exist() -> None:
    import lmprune

    for name in lmprune.__all__:
        first = getattr(lmprune, name)
        # a submodule of the same name would take its place once it is imported
        assert getattr(lmprune, name) is first and not isinstance(first, ModuleType), name
    with pytest.raises(AttributeError):
        _ = lmprune.nothing
