"""Every mistake is one line and an exit code, before any work and without a trace on disk."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_profile import noisy

from lmprune import cli
from lmprune.choosing import write_recipe
from lmprune.cli import show
from lmprune.cuts.plan import Plan
from lmprune.models.cut import open_cut


def invoke(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line, run in this process."""
    capsys.readouterr()  # what fixtures printed
    monkeypatch.setattr(sys, "argv", ["lmprune", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return lambda *words: invoke(capsys, monkeypatch, *words)


@pytest.fixture
def recipe(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    write_recipe(open_cut(tiny("llama")), Plan(8, (3, 4)), tmp_path / "r.yml")
    return tmp_path / "r.yml"


def test_help_is_quick_to_import(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['lmprune', '--help']\n"
        "from lmprune.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers', 'lm_eval', 'mergekit', 'peft', 'datasets', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip().endswith("set()")
    for command in ("profile", "recipe", "prune", "verify", "heal", "eval", "tasks", "demo", "plot", "support"):
        assert f" {command} " in done.stdout


def _modules_after(*words: str) -> tuple[str, str]:
    """(stderr, which of the heavy hosts were imported) of a command line."""
    code = (
        f"import sys; sys.argv = {['lmprune', *words]}\n"
        "from lmprune.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'lm_eval', 'mergekit', 'peft', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stderr, done.stdout.splitlines()[-1]


@pytest.mark.parametrize("words", [("show", "closed/x"), ("profile", "closed/x", "-o", "p.json"), ("bench", "closed")])
def test_a_folder_that_may_not_be_entered_is_one_line(
    words: tuple[str, ...], call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the system says it to whoever may not do everything, unlike those who run tests at times."""
    stat = os.stat

    def closed(path: Any, *more: Any, **how: Any) -> Any:
        if str(path).startswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *more, **how)

    monkeypatch.setattr(os, "stat", closed)
    code, out, err = call(*words)
    monkeypatch.undo()
    named = words[1]
    assert (code, out, err) == (
        1, "", f"lmprune: {named!r}: Permission denied. Mend that, or give another file or folder\n"
    )  # fmt: skip


@pytest.mark.parametrize("words", [("heal", "x", "--nonsense"), ("recipe",), ("sweep", "demo", "--samples", "two")])
def test_usage_errors_come_before_heavy_imports(words: tuple[str, ...]) -> None:
    said, heavy = _modules_after(*words)
    assert said.startswith("lmprune: ") and said.count("\n") == 1 and heavy == "[]"


def test_help_without_words_and_by_one_letter(call: Any) -> None:
    code, bare, err = call()
    assert code == 0 and err == "" and bare == call("--help")[1] == call("-h")[1]
    for command in (
        "profile",
        "recipe",
        "prune",
        "verify",
        "heal",
        "plot",
        "support",
        "tasks",
        "sweep",
        "bench",
        "demo",
    ):
        code, out, _ = call(command, "-h")
        assert code == 0 and out.startswith(f"Usage: lmprune {command}")
        assert max(map(len, out.splitlines())) <= 80 and "\x1b" not in out and "…" not in out


def test_an_interruption_and_a_bug_are_one_line_each(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for raised, code, says in (
        (KeyboardInterrupt(), 130, "lmprune: interrupted\n"),
        (OSError(28, "No space left on device"), 1, "lmprune: No space left on device. Make room, and run"),
        (ZeroDivisionError("by\nzero"), 1, "lmprune: unexpected ZeroDivisionError: by zero. Set LMPRUNE_DEBUG=1"),
    ):

        def fail(error: BaseException = raised) -> None:
            raise error

        monkeypatch.setattr("lmprune.tasks_folder.tasks_folder", fail)
        got, out, err = call("tasks")
        assert (got, out) == (code, "") and err.startswith(says) and err.count("\n") == 1


@pytest.mark.slow
def test_an_interruption_while_hosts_are_imported_is_one_line(tmp_path: Path) -> None:
    words = [sys.executable, "-X", "importtime", "-m", "lmprune", "profile", "demo", "-o", "p.json"]
    # A child of a shell's background job ignores the signal, unless told otherwise.
    default = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(words, cwd=tmp_path, text=True, stdout=-1, stderr=-1, **default) as running:  # type: ignore[call-overload]
        for line in running.stderr:
            if line.rstrip().endswith("torch.utils"):
                break
        running.send_signal(signal.SIGINT)
        said = [line for line in running.stderr.read().splitlines() if not line.startswith("import time:")]
    assert (said, running.returncode) == (["lmprune: interrupted"], 130)


def test_whoever_reads_half_of_the_output_sees_no_error(tmp_path: Path) -> None:
    command = f"{Path(sys.executable).parent / 'lmprune'} support | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("architecture") and done.stderr == ""


def test_tables_fit_80_columns_and_go_on_below() -> None:
    head = ("model", *(f"a figure {i}" for i in range(12)))
    text = show.table(head, [("[bold]one", *("1234567" for _ in range(12)))], numbers=True)
    blocks = text.split("\n\n")
    assert len(blocks) > 1 and all(block.splitlines()[-1].startswith("[bold]one") for block in blocks)
    assert max(map(len, text.splitlines())) <= 80 and text.count("1234567") == 12


def test_the_library_speaks_by_its_logger_and_the_command_line_prints_it(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("lmprune.somewhere")
    logger.info("unheard")
    with show.speaking():
        logger.info("heard")
    logger.info("unheard again")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "heard\n")


MODEL_ERRORS = [
    (("recipe", "./none", "-o", "x.yml", "--drop", "2"), 1, "no model at './none'"),
    (("recipe", "nobody/nothing", "-o", "x.yml", "--drop", "2"), 1, "cannot be reached"),
    (
        ("recipe", "MODEL", "-o", "x.yml"),
        2,
        "exactly one of --drop, --fraction, --layers, --rebase, --from-yaml, --max-loss, --max-increase",
    ),
    (("recipe", "MODEL", "-o", "x.yml", "--drop", "2", "--fraction", "0.5"), 2, "exactly one of"),
    (("recipe", "MODEL", "-o", "x.yml", "--drop", "8", "--criterion", "deepest"), 2, "give 1 to 7"),
    (("recipe", "MODEL", "-o", "x.yml", "--drop", "0", "--criterion", "deepest"), 2, "--drop 0"),
    (("recipe", "MODEL", "-o", "x.yml", "--fraction", "1.5", "--criterion", "deepest"), 2, "between 0 and 1"),
    (("recipe", "MODEL", "-o", "x.yml", "--layers", "3-5,4"), 2, "named twice"),
    (("recipe", "MODEL", "-o", "x.yml", "--layers", "7-9"), 2, "layer 8 does not exist"),
    (("recipe", "MODEL", "-o", "x.yml", "--layers", "0-7"), 2, "at least one must stay"),
    (("recipe", "MODEL", "-o", "x.yml", "--drop", "2", "--criterion", "depest"), 2, "did you mean 'deepest'"),
    (("recipe", "MODEL", "-o", ".", "--drop", "2", "--criterion", "deepest"), 1, "is a folder"),
    (("recipe", "MODEL", "-o", "x.yml", "--drop", "two"), 2, "'two'"),
    (("recipe", "MODEL", "-o", "x.yml", "--dorp", "2"), 2, "--drop"),
    (("recipe", "none.json", "-o", "x.yml", "--drop", "2"), 1, "none.json"),
    (("recipe", "MODEL"), 2, "--output"),
    (("profile", "MODEL", "-o", "x.json", "--data", "none.txt"), 1, "none.txt"),
    (("profile", "MODEL", "-o", "x.json", "--samples", "0", "--data", "demo"), 2, "--samples 0"),
    (("profile", "MODEL", "-o", "x.json"), 1, "cannot be reached"),
    (("profile", "MODEL", "-o", "x.json", "--data", "empty.txt"), 1, "empty.txt"),
    (("profile", "MUTE", "-o", "x.json", "--data", "demo"), 1, "no tokenizer"),
    (("recipe", "BARE", "-o", "x.yml", "--layers", "2"), 1, "no model.safetensors"),
    (("recipe", "MODEL", "-o", "full/file/x.yml", "--layers", "2"), 1, "full/file"),
    (("heal", "MODEL", "full", "--data", "demo"), 1, "not empty"),
    (("heal", "MODEL", "out", "--data", "demo", "--method", "magic"), 2, "magic"),
    (("heal", "./none", "out"), 1, "no model at './none'"),
    (("demo", "full"), 1, "not empty"),
    (("demo", "--drop", "12"), 2, "--drop 12"),
    (("plot", "none.json", "-o", "x.png"), 1, "none.json"),
    (("prune", "none.yml", "out"), 1, "no recipe at none.yml"),
    (("prune", "RECIPE", "full"), 1, "not empty"),
    (("prune", "RECIPE", "full/file"), 1, "is a file"),
    (("prune", "RECIPE", "out", "--writer", "magic"), 2, "'--writer': 'magic' is not one of"),
    (("verify", "RECIPE", "none"), 1, "no file or folder 'none'"),
    (("recipe", "MODEL", "-o", "x.yml", "--layers", "2", "--criterion", "greedy"), 2, "--criterion has no effect"),
    (("recipe", "MODEL", "-o", "x.yml", "--layers", "2", "--no-check", "--data", "demo"), 2, "--data has no effect"),
    (("recipe", "RECIPE", "-o", "x.yml", "--rebase", "--protect", "1"), 2, "--protect has no effect"),
    (
        ("recipe", "MODEL", "-o", "x.yml", "--drop", "2", "--criterion", "deepest", "--no-check", "--samples", "9"),
        2,
        "--samples has no",
    ),
    (("recipe", "PROFILE", "-o", "x.yml", "--drop", "1", "--no-check", "--data", "demo"), 2, "--data has no effect"),
    (("profile", "MODEL", "-o", "x.json", "--data", "demo", "--drop", "2"), 2, "no effect without --until"),
    (("profile", "MODEL", "-o", "x.json", "--data", "demo", "--indifference", "0.1"), 2, "no effect without --until"),
    (("profile", "MODEL", "-o", "x.json", "--data", "demo", "--split", "train"), 1, "--split train has no effect"),
    (("profile", "MODEL", "-o", "x.json", "--data", "empty.txt", "--column", "a"), 1, "--column a has no effect"),
    (("profile", "MODEL", "-o", "x.json", "--data", "demo", "--no-bos"), 2, "--no-bos has no effect without --pack"),
    (("heal", "RECIPE", "out", "--data", "demo", "--no-pack"), 2, "--no-pack: healing"),
    (("nonsense",), 2, "nonsense"),
]


@pytest.mark.parametrize(("words", "code", "says"), MODEL_ERRORS, ids=[" ".join(words) for words, _, _ in MODEL_ERRORS])
def test_mistakes(
    words: tuple[str, ...], code: int, says: str, call: Any, recipe: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    (tmp_path / "empty.txt").write_text("\n\n")
    for name, without in (("mute", "tokenizer*"), ("bare", "*.safetensors")):
        shutil.copytree(tiny("llama"), tmp_path / name, ignore=shutil.ignore_patterns(without))
    profile = tmp_path / "p.json"
    if "PROFILE" in words:
        replace(noisy(8, 8, 0.1, n=1), model=str(tiny("llama")), fingerprint=None).write(profile)
    before = sorted(tmp_path.rglob("*"))
    places = {"MODEL": tiny("llama"), "RECIPE": recipe, "MUTE": tmp_path / "mute", "BARE": tmp_path / "bare"}
    places["PROFILE"] = profile
    got, out, err = call(*(places.get(word, word) for word in words))
    assert got == code, err
    assert says in err and out == ""
    assert err.startswith("lmprune: ") and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_debug_shows_the_traceback(run: Callable[..., Any]) -> None:
    done = run("lmprune", "prune", "none.yml", "out", code=1, LMPRUNE_DEBUG="1")
    assert "Traceback" in done.stderr


def test_commands_without_noise(run: Callable[..., Any], recipe: Path, tmp_path: Path) -> None:
    """stdout holds the result, stderr nothing of the hosts' chatter."""
    done = run("lmprune", "prune", recipe, "out", "--json", fresh=True)
    assert json.loads(done.stdout)["proof"]["differences"] == []
    for noise in ("gemm_4bit", "Loading weights", "deprecated", "Warning", "it/s"):
        assert noise not in done.stderr, done.stderr
    done = run("lmprune", "verify", recipe, "out")
    assert "is what its recipe promises" in done.stdout
    (tmp_path / "out" / "config.json").write_text(
        (tmp_path / "out" / "config.json").read_text().replace('"num_hidden_layers": 6', '"num_hidden_layers": 7')
    )
    done = run("lmprune", "verify", recipe, "out", code=3)
    assert "differs: config.num_hidden_layers is 7, not 6" in done.stdout


def test_a_recipe_from_a_model_profiles_it_once(call: Any, tiny: Callable[..., Path], tmp_path: Path) -> None:
    words = (
        "recipe",
        tiny("qwen3"),
        "-o",
        "r.yml",
        "--drop",
        "2",
        "--data",
        "demo",
        "--samples",
        "8",
        "--max-length",
        "32",
    )
    code, out, err = call(*words)
    assert code == 0, err
    assert "drops 2 of 8 layers" in out and "angular distance d(" in out
    made = (tmp_path / "r.profile.json").stat().st_mtime_ns
    code, again, err = call(*words)
    assert code == 0 and again == out
    assert (tmp_path / "r.profile.json").stat().st_mtime_ns == made
    code, from_profile, _ = call("recipe", "r.profile.json", "-o", "s.yml", "--drop", "2", "--json")
    assert code == 0 and json.loads(from_profile)["choice"]["start"] == json.loads(from_profile)["dropped"][0]
    assert len([*tmp_path.glob("r-base-*"), *tmp_path.glob("s-base-*")]) == 2


def test_support_can_be_asked_for_a_few(call: Any) -> None:
    code, out, _ = call("support", "qwen3", "--json")
    assert (
        code == 0 and json.loads(out)["rows"] and all("qwen3" in row["architecture"] for row in json.loads(out)["rows"])
    )
    code, out, err = call("support", "quen3")
    assert code == 2 and out == "" and "did you mean 'qwen3" in err
