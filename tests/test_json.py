"""What ``--json`` prints has the shape that docs/json.md describes, and tables fit 80 columns: of every command."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from lmprune.cli import app, show

DOCS = Path(__file__).parents[1] / "docs" / "json.md"
TEXT = "--data demo --samples 12 --max-length 32 --device cpu"
QUICK = {
    "recipe": "demo --drop 3 --criterion deepest --no-check -o r.yml",
    "prune": "r.yml pruned --no-logits",
    "verify": "r.yml pruned --no-logits",
    "check": "r.yml",
    "show": "r.yml",
    "recipes": "--search demo",
    "support": "qwen3",
    "tasks": "",
    "push": "r.yml user/cut --dry-run -o card --base user/demo",
    "demo": "--where",
}
SLOW = {
    "profile": f"demo -o p.json {TEXT}",
    "plot": "p.json -o map.svg",
    "layers": f"demo {TEXT}",
    "compare": f"demo --drop 3 --criteria deepest,angular,random {TEXT}",
    "bench": "demo r.yml --prompts 4 --batch-sizes 1 --tokens 2 --warmup 1 --runs 1 --device cpu",
    "quantize": "pruned small --quantization int8 --samples 2 --max-length 32 --data demo --device cpu",
    "draft": "r.yml --samples 4 --max-length 32 --prompts 0 --device cpu",
    "heal": "r.yml healed --method refit --fit-blocks 64 --eval-blocks 4 --max-length 64 --data demo --device cpu",
    "report": "SWEEP -o report.html",
}
ELSEWHERE = {"sweep", "run", "export", "eval"}
"""Run whole in other files; the harness prints its own results."""
Printed = dict[str, tuple[dict[str, Any], list[str]]]


def _printed(calls: Mapping[str, str], folder: Path) -> Printed:
    """What each command prints with ``--json``, and its tables."""
    tables: list[str] = []
    table, out, found = show.table, list[str](), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(show, "table", lambda *given, **how: tables.append(table(*given, **how)) or tables[-1])
        patch.setattr("builtins.print", lambda *words, **how: out.extend(words) if "file" not in how else None)
        for command, words in calls.items():
            tables.clear(), out.clear()
            app.run([command, *words.split(), "--json"])
            assert len(out) == 1, "one object and nothing else"
            found[command] = json.loads(out[0]), [*tables]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("json")


@pytest.fixture(scope="module")
def quick(folder: Path) -> Printed:
    return _printed(QUICK, folder)


@pytest.fixture(scope="module")
def slow(folder: Path, quick: Printed, sweep_folder: Path) -> Printed:
    return _printed({name: words.replace("SWEEP", str(sweep_folder)) for name, words in SLOW.items()}, folder)


def described(command: str) -> tuple[set[str], set[str]]:
    """The keys that docs/json.md promises of a command, and those that it promises sometimes."""
    row = next(line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{command}` |"))
    keys = row.split("|")[2]
    sometimes = set(re.findall(r"`(\w+)`\?", keys))
    return set(re.findall(r"`(\w+)`", keys)) - sometimes, sometimes


def test_every_command_is_described() -> None:
    commands = set(get_command(app.app).commands)  # type: ignore[attr-defined]
    assert {*QUICK, *SLOW, *ELSEWHERE} == commands
    for command in commands - {"eval"}:
        assert described(command)


@pytest.mark.parametrize("command", QUICK)
def test_a_result_has_the_common_shape(command: str, quick: Printed, folder: Path) -> None:
    _check_shape(command, *quick[command], folder)


@pytest.mark.slow
@pytest.mark.parametrize("command", SLOW)
def test_a_measured_result_has_the_common_shape(command: str, slow: Printed, folder: Path) -> None:
    _check_shape(command, *slow[command], folder)


def _check_shape(command: str, data: dict[str, Any], tables: list[str], folder: Path) -> None:
    said = dict(data)
    assert (said.pop("format"), said.pop("version")) == (f"lmprune-{command}", show.VERSION)
    always, sometimes = described(command)
    assert always <= set(said) <= always | sometimes, set(said) ^ always
    if "out" in said:
        assert (folder / said["out"]).exists()
    for key, value in _nested(said):
        if key in ("scores", "losses", "rises"):
            assert all(set(one) == {"value", "error"} for one in value.values()), command
        if key in ("rise", "gap_closed", "repair_closed") and value is not None:
            assert set(value) == {"value", "error"}, command
    for table in tables:
        assert max(map(len, table.splitlines())) <= 80, table


def _nested(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _nested(item)


def test_a_table_with_a_long_name_fits() -> None:
    """Whatever a model or a task is called."""
    for row in ([("x" * 200, "1.0", "2.0")], [("a/" * 60, *("1234567" for _ in range(2)))], [("m", "y" * 100, "2")]):
        for how in ({}, {"numbers": True}, {"text": True}):
            text = show.table(("model", "a", "b"), row, **how)
            assert max(map(len, text.splitlines())) <= 80
            assert text.count("x") + text.count("y") + text.count("a/") >= sum(cell.count("x") for cell in row[0])


def test_numbers_that_are_none_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    with show.answering("bench", True):
        show.result("", {"rows": [{"a": float("nan"), "b": (1, Path("x"))}]})
    assert json.loads(capsys.readouterr().out)["rows"] == [{"a": None, "b": [1, "x"]}]
