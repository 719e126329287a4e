"""The benchmark that sets all ways of cutting side by side: which rows there are, going on, and bad input."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lmprune.choosing import write_recipe
from lmprune.cuts.plan import Plan
from lmprune.errors import LmpruneError, UsageError
from lmprune.models.cut import open_cut
from lmprune.writing.pruning import prune

sys.path.append(str(Path(__file__).resolve().parents[1]))
from benchmarks import budget, paper, peers, scoreboard
from benchmarks.scoreboard import Clock, Made, Rows, Wanted, best_of, planned

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rows_are_cuts_then_their_repairs_for_every_number() -> None:
    rows = planned([1, 2], ["angular", "finercut"], ["angular", "search"], ["width"])
    cuts = ("depth-angular-cut", "sublayers-finercut-cut", "width-search-cut")
    every = (*cuts, "depth-angular-refit", "width-search-refit")
    assert [row.name for row in rows] == ["whole", *(f"1-{name}" for name in every), *(f"2-{name}" for name in every)]


def test_the_best_repaired_cuts_are_healed_each_once() -> None:
    rises = [("a", "3", 0.3), ("b", "4", 0.1), ("c", "4", 0.1), ("d", "5", 0.2)]
    found: dict[str, Any] = {
        by: {"drop": 1, "kind": "depth", "by": by, "stage": "refit", "gone": gone, "rise": rise}
        for by, gone, rise in rises
    }
    found["bad"] = {"drop": 1, "kind": "depth", "by": "bad", "stage": "refit", "why": "no"}
    assert [row.by for row in best_of(found, 1, 2)] == ["b", "d"] and best_of(found, 2, 2) == []


def test_half_a_row_is_made_again_and_other_settings_are_refused(tmp_path: Path) -> None:
    rows = Rows(tmp_path, {"samples": 8})
    rows.add(Wanted(1, "depth", "angular"), {"gone": "2", "rise": 0.5})
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"name": "1-depth-gre')
    again = Rows(tmp_path, {"samples": 8})
    assert list(again.found) == ["1-depth-angular-cut"] and again.like("cut", "2") and not again.like("refit", "2")
    again.add(Wanted(1, "depth", "greedy"), {"why": "no"})
    assert len(Rows(tmp_path, {"samples": 8}).found) == 2
    with pytest.raises(UsageError, match=r"another samples \(8\)"):
        Rows(tmp_path, {"samples": 9})


def test_a_clock_expects_what_took_longest() -> None:
    clock = Clock(10.0)
    assert clock.fits("cut")
    clock.took("cut", 20.0)
    assert not clock.fits("cut") and not clock.fits("refit") and Clock(None, longest={"cut": 1e9}).fits("cut")


# --- a toy, all the way ---------------------------------------------------------------------------------------------


class Here:
    """Commands in this process, which saves their start; a name in ``fails`` fails."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fails = ""

    def __call__(self, words: Sequence[str], folder: Path) -> Made:
        from lmprune.cli.app import run

        self.ran.append(" ".join(words))
        if self.fails and self.fails in words:
            return Made({}, 0.0, None, "it fails")
        out, before = io.StringIO(), Path.cwd()
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(out):
                assert not run([*words, "--json"])
        except LmpruneError as exc:
            return Made({}, 0.5, None, str(exc))
        finally:
            os.chdir(before)
        return Made(json.loads(out.getvalue()), 0.5, 1000)


@pytest.fixture
def board(tmp_path: Path) -> Callable[..., tuple[int, Here]]:
    """Fill a board of the demo model by few samples."""
    from itertools import islice

    from lmprune.text import world

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(islice(world.documents("board"), 400)))

    def fill(*words: str, here: Here | None = None, source: Path = text) -> tuple[int, Here]:
        here = here or Here()
        small = {"--samples": "8", "--held-out": "4", "--max-length": "32", "--fit-blocks": "16", "--eval-blocks": "2"}
        small |= {"--tokens": "2", "--kinds": "none", "--tasks": "none", "--draws": "1", "--healed": "0"}
        options = [word for pair in small.items() if pair[0] not in words for word in pair]
        place = ["--out", str(tmp_path / "out"), "--results", str(tmp_path), "--name", "toy"]
        code = scoreboard.main(["demo", "--text", str(source), *options, *place, *words], here)
        return code, here

    return fill


@pytest.mark.slow
def test_a_board_is_filled_and_goes_on(
    board: Callable[..., tuple[int, Here]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = Here()
    here.fails = "random"
    code, _ = board("--drop", "3", "--criteria", "deepest,random,angular", "--refit", "deepest,random", here=here)
    rows = list(csv.DictReader((tmp_path / "toy.csv").open()))
    assert code == 0 and [row["stage"] for row in rows] == ["cut", "cut", "cut", "cut", "refit", "refit"]
    by = {(row["by"], row["stage"]): row for row in rows}
    assert (
        by["random 0", "cut"]["gone"] == "it fails" and by["random 0", "refit"]["gone"] == "there is no cut to repair"
    )
    assert float(by["", "cut"]["agreement"]) == 1 and float(by["", "cut"]["rise"]) == 0
    deepest, repaired = by["deepest", "cut"], by["deepest", "refit"]
    assert deepest["gone"] == repaired["gone"] == "8-10" and float(deepest["parameters"]) == pytest.approx(
        0.75, abs=0.001
    )
    assert float(deepest["rise"]) > 0 and repaired["rise"] != deepest["rise"]
    assert deepest["command"].startswith("lmprune recipe ") and "--criterion deepest --drop 3" in deepest["command"]
    assert (tmp_path / "toy.png").stat().st_size > 1000 and "| deepest | cut | 8-10 |" in (
        tmp_path / "toy.md"
    ).read_text()
    assert (tmp_path / "toy.md").read_text().endswith(f"\n{scoreboard.SEPARATE}\n")
    origin = json.loads((tmp_path / "toy.json").read_text())
    assert origin["rows"] == 6 and origin["text"]["file"] == "text.txt" and len(origin["text"]["sha256"]) == 64

    _, again = board("--drop", "3", "--criteria", "deepest,random,angular,one-shot", "--refit", "deepest,random")
    assert [line.split()[0] for line in again.ran] == ["recipe"] and "one-shot" in again.ran[0]

    capsys.readouterr()
    code, none = board("--drop", "3", "--criteria", "magnitude", "--budget", "0.001s")
    assert code == 1 and "too small for one row, which takes about" in capsys.readouterr().err and not none.ran


@pytest.mark.parametrize(
    "words, says",
    [
        (("--held-out", "4000"), "its last fifth fill"),
        (("--samples", "40000"), "Give more text, or smaller --samples and --fit-blocks"),
        (("--drop", "12"), "--drop '12': give numbers from 1 to 11"),
        (("--criteria", "gredy"), "did you mean 'greedy'"),
        (("--budget", "soon"), "--budget 'soon' is no time"),
        (("--budget", "0.001s"), "too small for one row"),
    ],
)
def test_bad_input_is_one_line(
    words: tuple[str, ...],
    says: str,
    board: Callable[..., tuple[int, Here]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, here = board(*words)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert code == 1 and len(errors) == 1 and says in errors[0] and not here.ran


def test_a_model_needs_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert scoreboard.main(["nowhere"]) == 1 and "Give --text FILE.txt" in capsys.readouterr().err


@pytest.mark.parametrize("module", [peers, budget])
@pytest.mark.parametrize("option", ["--budget=2h", "--share", "--heal=", "--criteria=angular"])
def test_what_a_benchmark_does_not_read_it_does_not_take(
    module: Any, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        module.main(["demo", option])
    assert f"unrecognized arguments: {option}" in capsys.readouterr().err


def test_commands_that_made_results_are_still_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def parsed(*_: Any, **__: Any) -> None:
        raise UsageError("parsed")

    modules, taken = {"scoreboard": scoreboard, "peers": peers, "budget": budget}, set()
    for module in modules.values():
        monkeypatch.setattr(module, "Board", parsed)
    for file in scoreboard.RESULTS.glob("*.json"):
        program, *words = shlex.split(json.loads(file.read_text())["command"].removeprefix("python -m benchmarks."))
        if program in modules:
            assert modules[program].main(words) == 1, file
            assert capsys.readouterr().err == "error: parsed\n", file
            taken.add(program)
    assert taken == {*modules}


def test_peers_take_one_number_of_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main(["demo", "--drop", "2,4", "--out", str(tmp_path)]) == 1
    assert "--drop 2,4: give one number of layers" in capsys.readouterr().err


# --- the peers, and the paper's curves ------------------------------------------------------------------------------


def test_a_peer_that_does_not_install_says_why_in_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "warning\nERROR: No matching distribution found\n")
    monkeypatch.setattr(peers, "process", lambda *_: (failed, 0.0))
    said = "it does not install: ERROR: No matching distribution found"
    assert peers.installed("optipfair", tmp_path) == said

    def broken() -> dict[str, Any]:
        raise ValueError("their code\nfails")

    made: list[str] = []

    def ours() -> dict[str, Any]:
        made.append("once")
        return {"gone": "3", "rise": 0.1, "agreement": 0.9, "seconds": 2.0, "parameters": 0.9, "speed": 1.1}

    jobs = [
        ("job", "lmprune", "", ours),
        ("job", "optipfair", "x", lambda: {"why": said}),
        ("job", "other", "", broken),
    ]
    monkeypatch.setattr(peers.Peers, "ways", lambda self: jobs)
    words = ["--samples", "4", "--held-out", "2", "--max-length", "16", "--fit-blocks", "1", "--eval-blocks", "1"]
    place = ["--out", str(tmp_path / "out"), "--results", str(tmp_path), "--name", "toy"]
    for _ in range(2):
        assert peers.main(["demo", *words, *place]) == 0
    rows = list(csv.DictReader((tmp_path / "peers-toy.csv").open()))
    told = json.loads((tmp_path / "peers-toy.json").read_text())
    assert f"\n\n`{told['command']}`, {told['date']}. " in (tmp_path / "peers-toy.md").read_text()
    assert made == ["once"] and [row["ratio"] for row in rows] == ["1.0", "", ""]
    assert rows[1]["gone"] == said and rows[2]["gone"].startswith("ValueError: their code")


def test_a_budget_is_a_row_for_each_way_to_keep_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []

    def run(words: Sequence[str], folder: Path) -> Made:
        """A search that always finds layer 3, or layers 3 and 4, and a refit that changes nothing."""
        ran.append(list(words))
        if words[0] == "heal":
            prune(folder / words[1], folder / words[2], logits=False)
            return Made({}, 2.0, 1000)
        if "--speed" in words:
            return Made({}, 1.0, None, "the budget cannot be reached")
        gone = (3, 4) if "depth" in words else (3,)
        write_recipe(open_cut("demo"), Plan(12, gone), folder / words[words.index("-o") + 1])
        return Made({"choice": {"trials": 7, "passes": 9.5}}, 3.0, 5_000_000)

    def theirs(source: Path, folder: Path, kind: str, amount: str, rows: Sequence[Any]) -> peers.Pruned | str:
        assert len(rows) == 8 and len({len(row) for row in rows}) == 1
        if kind == "depth":
            return "it does not install"
        write_recipe(open_cut("demo"), Plan(12, (5,)), folder / "theirs.yml")
        prune(folder / "theirs.yml", folder / "theirs", logits=False)
        return peers.Pruned(folder / "theirs", 1.5, None)

    monkeypatch.setattr(budget, "optipfair", theirs)
    monkeypatch.setattr(budget, "times_as_fast", lambda live, whole, **how: 1.2)
    words = ["--samples", "8", "--held-out", "4", "--max-length", "32"]
    words += ["--tasks", "none", "--params", "0.9", "--search", "--with ffn --steps 1", "--refitting", "--fit-blocks 8"]
    words += ["--out", str(tmp_path / "out"), "--results", str(tmp_path), "--name", "toy"]
    assert budget.main(["demo", *words], run) == 0
    rows = {row["way"]: row for row in csv.DictReader((tmp_path / "budget-toy.csv").open())}
    ours, alone = rows[budget.SEARCH], rows[budget.DEPTH]
    assert list(rows)[1:] == [budget.SEARCH, budget.DEPTH, budget.AS_FAST, budget.WIDTH_PEER, budget.DEPTH_PEER]
    assert (ours["left"], alone["left"], ours["trials"], ours["passes"]) == ("3", "3-4", "7", "9.5")
    assert float(ours["cut"]) == pytest.approx(float(ours["rise"]), abs=1e-3) and float(ours["peak"]) == 5
    assert float(ours["parameters"]) == pytest.approx(11 / 12, abs=1e-3) and rows[budget.AS_FAST]["left"].endswith(
        "reached"
    )
    searched, healed, deep, _, fast = (" ".join(line) for line in ran)
    assert "--params 0.9 --with ffn --steps 1" in searched and healed.endswith("--method refit --fit-blocks 8")
    assert "--with depth --steps 1" in deep and "--speed 1.20x --with depth" in fast
    peer = rows[budget.WIDTH_PEER]
    assert peer["left"] == "15 % of the neurons" and float(peer["cut"]) > 0 and not peer["rise"]
    assert rows[budget.DEPTH_PEER]["left"] == "it does not install"
    told = json.loads((tmp_path / "budget-toy.json").read_text())
    assert told["commands"]["0.9-lmprune"].startswith("lmprune recipe demo") and "speed" in told["columns"]

    before = len(ran)
    assert budget.main(["demo", *words], run) == 0 and len(ran) == before  # rows are made once
    capsys.readouterr()
    assert budget.main(["demo", *words, "--params", "1.5"], run) == 1
    assert "--params '1.5': give shares" in capsys.readouterr().err
    assert budget.main(["demo", *words, "--search", ""], run) == 1
    assert "holds rows with another search" in capsys.readouterr().err


def test_the_papers_curves_are_read_from_rows_and_from_a_sweep(sweep_folder: Path, tmp_path: Path) -> None:
    board = tmp_path / "board"
    rows = Rows(board, {"title": "a toy", "layers": 8, "vocabulary": 100})
    rows.add(Wanted(0, "whole", ""), {"loss": 2.0, "tasks": {"t": 0.9}})
    rows.add(Wanted(2, "depth", "angular"), {"loss": 3.0, "tasks": {"t": 0.5}})
    rows.add(Wanted(2, "depth", "angular", "refit"), {"loss": 2.5, "tasks": {"t": 0.7}})
    rows.add(Wanted(2, "width", "search"), {"loss": 2.5, "tasks": {"t": 0.7}})
    found = paper.read(board)
    assert found.whole["t"] == 0.9 and found.values["t"] == {
        ("angular", "as cut"): {0.25: 0.5}, ("angular", "refitted"): {0.25: 0.7}
    }  # fmt: skip
    assert found.values[paper.LOSS]["angular", "as cut"][0.25] == pytest.approx(3 / math.log(100))
    swept = paper.read(sweep_folder)
    assert set(swept.values["lmprune_demo_facts"]["angular", "as cut"]) == {0.25, 0.5} and swept.layers == 8
    assert paper.main([str(board), str(sweep_folder), "-o", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert paper.main([str(tmp_path), "-o", str(tmp_path / "p.png")]) == 1
