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

# From the ground up. A room may import the floors below its own, and nothing of its own floor but itself.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"settings", "files", "versions", "quiet", "hub", "plugins", "tasks_folder", "cache"}),
    frozenset({"cuts"}),
    frozenset({"drawing"}),
    frozenset({"text"}),
    frozenset({"models"}),
    frozenset({"forward"}),
    frozenset({"profiling"}),
    frozenset({"criteria"}),
    frozenset({"writing", "healing", "narrowing", "evaluation", "benching"}),
    frozenset({"choosing"}),
    frozenset({"comparing", "budgeting"}),
    frozenset({"sweeping"}),
    frozenset({"reporting"}),
    frozenset({"sharing"}),
    frozenset({"demo"}),
    frozenset({"cli"}),
)
STAGES = frozenset({"profiling", "writing", "healing", "narrowing", "evaluation", "benching"})
"""They meet in small types and never import one another, whatever their floors."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
DOORS = ("lmprune", "lmprune.__main__")
"""The public names and the command: they stand outside and look into every room."""


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
    return {name.split(".")[1] for name in _imports(file) if name.startswith("lmprune.")} - {"__version__"}


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_room_stands_on_a_floor() -> None:
    assert {_room(module) for module in FILES if module not in DOORS} == set(FLOOR)


@pytest.mark.parametrize("module", [module for module in FILES if module not in DOORS])
def test_imports_run_downwards(module: str) -> None:
    room = _room(module)
    above = {used for used in _rooms(FILES[module]) - {room} if FLOOR[used] >= FLOOR[room]}
    assert not above, f"{room} imports {above}, which stands beside or above it"
    if room in STAGES:
        assert not _rooms(FILES[module]) & (STAGES - {room})


def test_no_room_is_named_as_a_public_function() -> None:
    import lmprune

    assert not {_room(module) for module in FILES} & set(lmprune.__all__)


@pytest.mark.parametrize(
    ("host", "places"),
    [
        ("mergekit", {"lmprune.writing.mergekit"}),
        ("lm_eval", {"lmprune.evaluation"}),
        ("peft", {"lmprune.models.adapters"}),
        ("huggingface_hub", {"lmprune.hub"}),
        ("datasets", {"lmprune.text.sources"}),
        ("matplotlib", {"lmprune.drawing"}),
    ],
)
def test_each_host_is_imported_in_one_place(host: str, places: set[str]) -> None:
    users = {
        module for module, file in FILES.items() if any(n == host or n.startswith(host + ".") for n in _imports(file))
    }
    assert users and all(any(user == place or user.startswith(place + ".") for place in places) for user in users), (
        users
    )


PURE = [m for m in FILES if _room(m) in {"errors", *FLOORS[1], "cuts", "criteria"}] + [
    "lmprune.models.checkpoint",
    "lmprune.models.companions",
    "lmprune.models.cut",
    "lmprune.models.fields",
    "lmprune.models.locate",
    "lmprune.profiling.distances",
    "lmprune.profiling.sequential",
    "lmprune.profiling.settings",
    "lmprune.sharing.subjects",
    "lmprune.sharing.telling",
    "lmprune.choosing",
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
