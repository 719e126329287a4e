"""The whole path as one command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_cli import invoke

from lmprune.cli.run import Stage, Whole, go
from lmprune.cuts.plan import Plan
from lmprune.errors import LmpruneError
from lmprune.sweeping.run import SweepRun
from lmprune.sweeping.settings import SweepSettings
from lmprune.text.sources import DataSettings


def _whole(folder: Path, **given: Any) -> Whole:
    values: dict[str, Any] = {
        "model": "demo", "folder": folder, "fraction": 0.25, "criterion": "deepest", "repair": "refit", "heal": None,
        "tasks": None, "limit": None, "samples": 4, "max_length": 64, "data": (),
    }  # fmt: skip
    return Whole(**{**values, **given})


def test_each_stage_is_a_command_and_one_that_is_done_is_not_run_again(tmp_path: Path, monkeypatch: Any) -> None:
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr("lmprune.cli.app.run", lambda words: ran.append(tuple(words)))
    stage = Stage(("profile", "demo", "-o", str(tmp_path / "a b.json")), tmp_path / "a b.json")
    assert stage.line == f"lmprune profile demo -o '{tmp_path / 'a b.json'}'"
    assert go(stage) and ran == [stage.words]
    stage.leaves.touch()
    assert not go(stage) and len(ran) == 1


def test_the_choice_is_judged_after_the_repair_that_follows(tmp_path: Path) -> None:
    for criterion, repair, wanted in (("best", "refit", True), ("best", None, False), ("deepest", "refit", False)):
        _, recipe, _ = _whole(tmp_path, criterion=criterion, repair=repair).choosing()
        assert recipe.words[recipe.words.index("--after") + 1] == "refit" if wanted else "--after" not in recipe.words


def test_training_starts_from_what_was_repaired_and_the_sweep_measures_what_there_is(tmp_path: Path) -> None:
    path = _whole(tmp_path, heal="quick", limit=7)
    assert path.point == "deepest-03"
    (heal,), (sweep, *_) = path.healing(), path.measuring()
    assert heal.words[1] == str(path.recipe) and "--no-repair-first" in heal.words and "--repair" not in sweep.words
    path.repaired.mkdir(parents=True)
    (heal,), (sweep, *_) = path.healing(), path.measuring()
    assert heal.words[1] == str(path.repaired) and "--no-repair-first" not in heal.words
    assert sweep.words[-6:] == ("--repair", "refit", "--heal", "quick", "--limit", "7")


def test_what_cannot_be_is_said_before_anything_is_made(run: Any, tmp_path: Path) -> None:
    said = run("lmprune", "run", "demo", "-o", tmp_path / "out", "--repair", "lora", code=2).stderr
    assert "--repair lora: it trains" in said
    said = run("lmprune", "run", "demo", "-o", tmp_path / "out", "--fraction", "0.01", code=None).stderr
    assert "rounds to 0" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tasks": "lmprune_demo_fact"}, "lmprune_demo_fact"),
        ({"criterion": "finercut"}, "points of a sweep are whole layers"),
        ({"include_path": "nowhere"}, "no file or folder 'nowhere'"),
        ({"limit": 0}, "--limit 0"),
        ({"folder": "file"}, "file is not a folder"),
        ({"folder": "foreign"}, "holds 'mine.txt'"),
    ],
)
def test_what_a_later_stage_refuses_is_refused_first(
    given: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("foreign").mkdir()
    Path("foreign/mine.txt").write_text("")
    path = _whole(Path(given.pop("folder", "out")), **given)
    with pytest.raises(LmpruneError, match=re.escape(said)):
        path.check(DataSettings())
    assert not Path("out").exists()


def test_the_card_calls_a_base_that_is_a_folder_by_another_name(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for model, said in ((str(tiny("llama")), True), ("demo", False)):
        *_, push = _whole(tmp_path / "out", model=model).measuring()
        assert push.words[0] == "push" and ("--base" in push.words) is said


def test_what_a_killed_profile_leaves_is_gone_on_with(tmp_path: Path) -> None:
    """By a run, and by a sweep alone: the next thing to refuse is another."""
    (tmp_path / "profile.json.partial").write_text("")
    with pytest.raises(LmpruneError, match=r"none\.yml"):
        SweepRun("demo", tmp_path, SweepSettings(recipes="none.yml"), DataSettings())


def _killed(*given: Any, **more: Any) -> Any:
    raise KeyboardInterrupt


def test_a_killed_run_goes_on_with_the_stage_that_was_killed(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in one stage after the other, and the same at the end as one that was not."""
    monkeypatch.setattr(Whole, "measuring", lambda path: iter(()))  # tasks take long
    words = ("--criterion", "angular", "--repair", "none", "--tasks", "lmprune_demo", "--data", "demo")
    size = ("--samples", 4, "--max-length", 32)

    def called(out: Path) -> tuple[int, list[str]]:
        code, _, told = invoke(capsys, monkeypatch, "run", tiny("llama"), "-o", out, *words, *size)
        return code, [line.split()[3] for line in told.splitlines() if line.startswith("done before: ")]

    for inside, done in (
        ("lmprune.choosing.choose", []),
        ("lmprune.writing.pruning._proven", ["profile"]),
    ):
        with monkeypatch.context() as dying:
            dying.setattr(inside, _killed)
            assert called(tmp_path / "out") == (130, done)
    assert not (tmp_path / "out" / "pruned").exists()
    assert called(tmp_path / "out") == (0, ["profile", "recipe"]) and called(tmp_path / "straight") == (0, [])
    ours, theirs = (_files(tmp_path / name) for name in ("out", "straight"))
    assert ours.keys() == theirs.keys() and all(ours[name] == theirs[name] for name in ours if "safetensors" in name)


@pytest.mark.slow
def test_the_whole_path_and_again(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("lmprune", "run", "demo", "-o", out, "--criterion", "angular", "--samples", 16, "--limit", 4)
    first = run(*words).stderr
    assert "lmprune heal" in first and "done before" not in first
    told = json.loads((out / "sweep.json").read_text())
    assert [point["name"] for point in told["points"]] == ["baseline", "angular-03", "angular-03-repaired"]
    assert "angular-03-repaired" in (out / "report.html").read_text() and (out / "card" / "README.md").is_file()
    dropped = json.loads((out / "pruned" / "lmprune.json").read_text())["dropped"]
    assert Plan(12, tuple(dropped)).dropped == tuple(told["points"][1]["dropped"])
    assert run(*words).stderr.count("done before: ") == 7


def _files(folder: Path) -> dict[str, bytes]:
    """What is in it and what is in that, by names that no time is part of."""
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return {re.sub(r"_\d{4}-\d\d-\d\dT[\d.-]+", "", name): content for name, content in found.items()}
