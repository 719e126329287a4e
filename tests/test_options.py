"""The options: one name for one thing, none without effect, examples that parse, and mistakes told at once."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.main import get_command

from lmprune.cli import app as command_line
from lmprune.cli.help import examples, first_line
from lmprune.errors import LmpruneError, ModelError, UsageError

COMMANDS: dict[str, Any] = dict(get_command(command_line.app).commands)  # type: ignore[attr-defined]
TEXT = {"data", "split", "column", "config", "pack", "bos", "chat_template"}
MEASURING = {"samples", "max_length", "token", "seed", "until", "indifference", "batch_size", "device", "device_map"}
MEASURING |= {"dtype", "quantization", "stream", "resume"}


def options(command: str) -> dict[str, Any]:
    return {p.name: p for p in COMMANDS[command].params if p.param_type_name == "option"}


# --- names ------------------------------------------------------------------------------------------------------------


def test_no_thing_has_a_second_name() -> None:
    """Spellings that other names have replaced, in options, settings, messages and docs."""
    gone = "quant bits batch batches micro-batch keep restart revision types".split()
    flags = {flag for name in COMMANDS for p in options(name).values() for flag in (*p.opts, *p.secondary_opts)}
    assert not flags & {f"--{word}" for word in gone} and "-n" not in flags
    here = Path(__file__).parents[1]
    texts = [*here.glob("lmprune/**/*.py"), *here.glob("docs/*.md"), *here.glob("benchmarks/*"), here / "README.md"]
    for text in texts:
        if text.is_file():
            assert not re.findall(rf"--(?:{'|'.join(gone)})\b(?![-_])", text.read_text(encoding="utf-8")), text


def test_lists_have_plural_names() -> None:
    """Of two names for one thing, the plural takes several with commas."""
    for name in COMMANDS:
        for option in options(name).values():
            several = str(option.metavar or "").endswith(",...")
            if option.name in {
                "criterion",
                "criteria",
                "fraction",
                "fractions",
                "objective",
                "objectives",
                "batch_sizes",
                "quantization",
                "quantizations",
            }:
                assert several == (option.name[-1] == "s" or option.name == "criteria"), name


@pytest.mark.parametrize("name", ["device", "dtype", "quantization", "seed", "max_length", "samples", "batch_size"])
def test_an_option_is_refused_in_the_same_words_everywhere(name: str) -> None:
    wrong = {"device": "gpu", "dtype": "float", "quantization": "nf5"}.get(name)
    if wrong is None:
        return
    said = set()
    for command in (c for c in COMMANDS if name in options(c)):
        with pytest.raises(LmpruneError) as told:
            command_line.run([*_least(command), f"--{name}", wrong])
        assert wrong in str(told.value), command
        said.add(str(told.value).partition(". See")[0].partition(" does not exist")[0])
    assert len(said) <= 2, said  # click's own words where it knows the choices


def test_every_device_is_known_by_the_same_name() -> None:
    for name in COMMANDS:
        if (option := options(name).get("device")) is not None:
            assert option.default == "auto" and "cpu, cuda, cuda:1" in option.help


def _least(command: str) -> list[str]:
    """The least words that reach a command: its first example without options of the kind that are tried."""
    needed = {
        "profile": "demo -o p.json",
        "layers": "demo",
        "compare": "demo --drop 2",
        "recipe": "demo --drop 2 -o r.yml",
        "heal": "demo out",
        "sweep": "demo -o run",
        "bench": "demo",
        "draft": "demo",
        "run": "demo -o run",
        "quantize": "demo out --quantization nf4",
    }
    return [command, *needed[command].split()]


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole first line, examples that the parser takes, one heading for each group, and 80 columns."""
    told = COMMANDS[command].help
    assert re.fullmatch(r"[A-Z][^.]*(\.\w[^.]*)*\.", first_line(told)), first_line(told)
    lines = examples(told)
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert words[:2] == ["lmprune", command]
        COMMANDS[command].make_context(command, words[2:])
    for short in ("-h", "--help"):
        assert command_line.run([command, short]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"Usage: lmprune {command}") and max(map(len, out.splitlines())) <= 80
        assert "lmprune " + command in out and "Options:" in out
    pasted = out.partition("Examples:\n")[2].partition("\n\n")[0].replace("\\\n", " ")
    assert [shlex.split(line) for line in pasted.splitlines()] == [shlex.split(line) for line in lines]
    assert len(options(command)) < 12 or out.count(":\n") > 4, "many options stand under several headings"


def test_commands_stand_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    command_line.run([])
    out = capsys.readouterr().out
    assert [f"{heading}:" for heading in command_line.COMMANDS] == re.findall(r"^(?!Usage|Options)[A-Z].*:$", out, re.M)
    for command in COMMANDS:
        assert len(re.findall(rf"^  {command}  ", out, re.M)) == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str) -> None:
    environment = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = _lmprune(["--show-completion", shell], environment)
    assert "_LMPRUNE_COMPLETE" in shown and "lmprune" in shown
    if shell == "bash":
        asked = {"_LMPRUNE_COMPLETE": "complete_bash", "COMP_WORDS": "lmprune pr", "COMP_CWORD": "1"}
        assert _lmprune([], asked).split() == ["profile", "prune", "set()"]
        asked |= {"COMP_WORDS": "lmprune bench demo --batch", "COMP_CWORD": "3"}
        assert _lmprune([], asked).split() == ["--batch-sizes", "set()"]


def _lmprune(words: list[str], environment: dict[str, str]) -> str:
    """What the command line prints in a process of its own, and at the end which heavy hosts that imported."""
    code = (
        f"import os, sys; sys.argv = {['lmprune', *words]}; os.environ.update({environment})\n"
        "from lmprune.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers', 'lm_eval', 'mergekit', 'peft', 'datasets'} & set(sys.modules))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout


# --- mistakes before imports ------------------------------------------------------------------------------------------

MISTAKES = """
heal x y --nonsense
tasks --nonsense
demo --nonsense
support --nonsense
recipes --nonsense
nonsense
profile
profile demo
profile ./none -o p.json
profile demo -o p.json --data none.txt
profile demo -o p.json --data /dev/zero
profile demo -o p.json --data /dev/null/x
profile demo -o p.json --token both
profile demo -o p.json --device gpu
profile demo -o p.json --dtype x
profile demo -o p.json --samples two
profile demo -o p.json --samples 999999999999999999999999999999
quantize demo out --quantization nf4 --samples 999999999999999999999999999999
heal demo out --steps 999999999999999999999999999999
bench demo --runs 999999999999999999999999999999
profile demo -o LONG.json --data demo
recipe demo --layers 1 -o LONG.yml
prune demo-minus-3-deepest LONG
bench demo -o LONG
profile LONG -o p.json
prune demo-minus-3-deepest a\udcff
recipe demo --layers 1 -o a\udcff.yml
profile a\udcff -o p.json
profile demo -o p.json --quantization nf5
profile demo -o p.json --data demo --split a
profile demo -o p.json --bos
layers ./none
layers demo --objectives los
layers demo --objectives loss,loss
layers demo --device gpu
layers demo -o map.jpg
compare demo --drop 2 --criteria depest
compare demo --drop 2 --criteria angular,angular
compare demo --drop 2 --criteria angular,
compare demo --drop 2 --tasks a,,b
compare demo --drop 2 --objective los
compare demo --drop 2 -o map.jpg
compare ./none --drop 2
compare demo
recipe
recipe demo
recipe demo --drop 2
recipe ./none --drop 2 -o r.yml
recipe none.json --drop 2 -o r.yml
recipe demo --drop 2 -o r.yml --criterion depest
recipe demo --drop 2 -o r.yml --runtime vlm
recipe demo --drop 2 -o r.yml --objective los
recipe demo --drop 2 --fraction 0.5 -o r.yml
recipe demo --drop 2 -o r.yml --protect x
recipe demo --layers x -o r.yml
recipe --from-yaml none.yml -o r.yml
prune
prune none.yml out
prune x.yml out --writer magic
verify none.yml out
verify demo-minus-3-deepest ./none
heal
heal ./none out
heal demo out --method lara
heal demo out --preset quik
heal demo out --schedule cosin
heal demo out --device mps
heal demo out --quantization nf5
heal demo out --rank 2 --method full
heal demo out --data none.jsonl
heal demo --show-preset --preset quik
eval
eval --nonsense
eval --tasks x
eval --model_args recipe=r.yml
eval --modelargs pretrained=demo
eval --model_args pretraned=demo --tasks x
eval --model_args pretrained=./none --tasks x
eval --model_args pretrained=picture.png --tasks x
eval --model_args pretrained=profile.json --tasks x
eval --model_args pretrained=demo,recipe=none.yml --tasks x
eval --model_args pretrained=demo,recipe=./none --tasks x
eval --model_args pretrained=demo recipe=picture.png --tasks x
eval --model_args pretrained=demo,recipe=profile.json --tasks x
eval --model_args pretrained=demo,recipe=empty --tasks x
eval --model_args pretrained=demo,peft=./none --tasks x
eval --model_args {"pretrained":"./none"} --tasks x
eval --model lmprune --model_args pretrained=./none --tasks x
eval --model_args pretrained=empty --tasks x
profile picture.png -o p.json
layers empty
compare empty --drop 2
recipe picture.png --drop 2 -o r.yml
recipe --from-yaml profile.json -o r.yml
prune picture.png out
prune empty out
verify profile.json empty
heal broken.yml out
sweep profile.json -o s
bench demo broken.yml
check empty
export picture.png m.gguf
quantize profile.json out --quantization nf4
draft demo picture.png
show picture.png
push profile.json user/cut
run empty -o w
run demo+./none -o w
sweep
sweep ./none
sweep demo --criteria depest
sweep demo --criteria angular,angular
sweep demo --fractions 2
sweep demo --heal quik
sweep demo --repair lora
sweep demo --profile none.json
sweep demo --samples two
sweep demo --include_path ./none
bench
bench ./none
bench demo --prompts x
bench demo --quantizations nf5
report
report ./none -o r.html
report .
plot
plot none.json -o m.png
check
check ./none
check demo --runtime vlm
check demo --runtime vllm,vllm
export
export ./none m.gguf
export demo m.gguf --type f8
quantize
quantize demo out
quantize demo out --quantization nf5
draft
draft ./none
draft demo --draft-tokens x
draft demo --search d --criteria depest
draft demo --search d --criteria best,best
support qwem3
show
show ./none
push
push none.yml user/cut
push demo-minus-3-deepest user/cut --results ./none
push demo-minus-3-deepest user/cut --dry-run
demo --drop two
demo --drop 12
run
run ./none -o w
run demo -o w --criterion depest
run demo -o w --repair lora
run demo -o w --heal quik
run demo -o w --data none.txt
run demo -o w --include_path ./none
run demo -o w --criterion finercut
run demo -o w --limit 0
"""


def test_a_mistake_is_told_in_one_line_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    """A misspelt option or value, and a file that is not there, of every command."""
    mistakes = [line.replace("LONG", "x" * 300).split() for line in MISTAKES.strip().splitlines()]
    assert {words[0] for words in mistakes} >= set(COMMANDS)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\xff")
    (tmp_path / "profile.json").write_text('{"format": 1}')
    (tmp_path / "broken.yml").write_text("slices: [")
    (tmp_path / "empty").mkdir()
    code = f"""
import contextlib, io, sys
from lmprune.cli import main
for words in {mistakes!r}:
    sys.argv, said = ["lmprune", *words], io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as left:
        code = left.code
    heavy = {{"torch", "transformers", "peft", "mergekit", "datasets"}} & set(sys.modules)
    line = said.getvalue()
    right = code in (1, 2) and line.startswith("lmprune: ") and line.count("\\n") == 1 and "unexpected" not in line
    if heavy or not right:
        print(words, code, heavy, line)
        if heavy:
            break
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("", 0), done.stdout + done.stderr[-2000:]
    assert {path.name for path in tmp_path.iterdir()} == {"broken.yml", "empty", "picture.png", "profile.json"}


def test_eval_says_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in (
        (
            ["--model_args", "pretrained=demo,qantization=nf4"],
            "unknown key 'qantization' (did you mean 'quantization'?)",
        ),
        (["--model_arg", "pretrained=demo"], "did you mean '--model_args'"),
        ([], "which model? Give --model_args pretrained=MODEL and --tasks"),
        (["-a", "recipe=r.yml"], "Add pretrained=MODEL"),
        (["-a", '{"recipe": "r.yml"}'], "Add pretrained=MODEL"),
    ):
        with pytest.raises(UsageError) as told:
            command_line.run(["eval", *words])
        assert says in str(told.value)


# --- options without effect -------------------------------------------------------------------------------------------

EFFECT: dict[str, dict[str, str]] = {
    "profile": {
        "drop": "demo -o p --drop 2",
        "indifference": "demo -o p --indifference 0.01",
        "stream": "demo -o p --device-map auto --no-stream",
        "device": "demo -o p --device-map auto --device auto",
        "split": "demo -o p --data demo --split train",
        "column": "demo -o p --data demo --column text",
        "config": "demo -o p --data demo --config en",
        "bos": "demo -o p --bos",
    },
    "layers": {
        "limit": "demo --limit 3",
        "include_path": "demo --include_path .",
        "drop": "demo --drop 2",
        "indifference": "demo --indifference 0.01",
        "stream": "demo --quantization nf4 --no-stream",
        "device": "demo --device-map auto --device auto",
    },
    "compare": {
        "limit": "demo --drop 2 --limit 3",
        "include_path": "demo --drop 2 --include_path .",
        "indifference": "demo --drop 2 --indifference 0.01",
        "stream": "demo --drop 2 --quantization nf4 --no-stream",
        "device": "demo --drop 2 --device-map auto --device auto",
        "states": "demo --drop 2 --stream --states 3",
        "abreast": "demo --drop 2 --stream --abreast 3",
    },
    "recipe": {
        **{name: "RECIPE --rebase -o x.yml" for name in MEASURING | TEXT},
        **{
            name: "RECIPE --rebase -o x.yml"
            for name in ("criterion", "protect", "objective", "exact", "states", "abreast", "check")
        },
        **{
            name: "RECIPE --rebase -o x.yml"
            for name in ("loss_samples", "runtime", "trust_remote_code", "allow_pickle")
        },
    },
    "prune": {"logits": "RECIPE out --no-verify --logits"},
    "heal": {
        **{
            name: "demo out --method refit"
            for name in ("micro_batch_size", "patience", "gradient_checkpointing", "report_to")
        },
        **{
            name: "demo --show-preset"
            for name in ("keep_adapter", "as_adapter", "self_data", "resume", "eval_data", "dtype")
        },
        **{name: "demo --show-preset" for name in TEXT | {"device"}},
    },
    "sweep": {
        "samples": "demo --profile FILE --samples 256",
        "bench": "demo --points baseline --bench",
        "profile": "demo --criteria deepest --profile FILE",
        "holds": "demo --launcher print --knowledge-holds 0.9",
        "falls": "demo --launcher print --reasoning-falls 0.8",
        **{name: "demo --criteria deepest --agree 0" for name in TEXT},
    },
    "draft": {
        "fractions": "demo --fractions 0.5",
        "criteria": "demo --criteria deepest",
        "heal_steps": "demo --heal-steps 0",
        "prompt_length": "demo --prompts 0 --prompt-length 32",
        "tokens": "demo --prompts 0 --tokens 64",
    },
    "quantize": {name: "demo out --quantization nf4 --samples 0" for name in ("max_length", "seed", *sorted(TEXT))},
    "report": {
        "output": "RUN --check -o r.html",
        "holds": "RUN --check --knowledge-holds 0.9",
        "falls": "RUN --check --reasoning-falls 0.8",
    },
    "push": {name: "RECIPE user/cut --dry-run -o d" for name in ("private", "create_pr")},
    "demo": {"drop": "--where --drop 3"},
}
"""Command -> option -> a call in which it has no effect; the option itself is added where the call lacks it."""
VALUES = {
    "pack": "--pack",
    "bos": "--bos",
    "chat_template": "--no-chat-template",
    "stream": "--stream",
    "resume": "--resume",
    "exact": "--exact",
    "check": "--check",
    "trust_remote_code": "--trust-remote-code",
    "allow_pickle": "--allow-pickle",
    "gradient_checkpointing": "--no-gradient-checkpointing",
    "keep_adapter": "--keep-adapter",
    "self_data": "--self-data",
    "private": "--private",
    "create_pr": "--create-pr",
    "data": "--data=demo",
    "token": "--token=last",
    "until": "--until=0.9",
    "device": "--device=auto",
    "dtype": "--dtype=auto",
    "quantization": "--quantization=nf4",
    "criterion": "--criterion=angular",
    "runtime": "--runtime=vllm",
    "objective": "--objective=loss",
    "device_map": "--device-map=auto",
    "report_to": "--report-to=none",
    "indifference": "--indifference=0.01",
}


@pytest.mark.parametrize(("command", "option"), [(c, o) for c, found in EFFECT.items() for o in sorted(found)])
def test_an_option_without_effect_is_refused_with_its_default_too(
    command: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = (*options(command)[option].opts, *options(command)[option].secondary_opts)
    words = EFFECT[command][option].split()
    if not {word.partition("=")[0] for word in words} & set(flags):
        words.append(VALUES.get(option, f"{flags[0]}=1"))
    (tmp_path / "file.json").write_text("{}")
    (tmp_path / "run").mkdir()
    places = {"RECIPE": "demo-minus-3-deepest", "FILE": "file.json", "RUN": "run"}
    with pytest.raises(LmpruneError, match="has no effect") as told:
        command_line.run([command, *(places.get(word, word) for word in words)])
    assert any(flag in str(told.value) for flag in flags), told.value
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.json", "run"]


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("demo --layers 3 --criterion angular", "--criterion"),
        ("demo --layers 3 --token last", "--token"),
        ("demo --layers 3 --no-check --samples 1000", "--samples"),
        ("demo --drop 2 --criterion deepest --token last", "--token"),
        ("demo --drop 2 --criterion deepest --states 2", "--states"),
        ("demo --drop 2 --criterion greedy --stream --states 2", "--states"),
        ("demo --drop 2 --criterion greedy --stream --abreast 2", "--abreast"),
        ("demo --drop 2 --criterion finercut --abreast 2", "--abreast"),
        ("demo --drop 2 --criterion deepest --no-check --seed 0 --samples 1000", "--samples"),
        ("demo --drop 2 --criterion deepest --no-check --loss-samples 128", "--loss-samples"),
        ("demo --drop 2 --criterion greedy --until 0.9", "--until"),
        ("file.json --drop 2 --token last", "--token"),
        ("demo --drop 2 --criterion angular --exact", "--exact"),
    ],
)
def test_a_recipe_refuses_what_its_criterion_does_not_read(
    words: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.json").write_text("{}")
    with pytest.raises(UsageError, match=f"{flag} has no effect"):
        command_line.run(["recipe", *words.split(), "-o", "r.yml"])


def test_criteria_that_read_no_text_say_so() -> None:
    """And only they."""
    from lmprune.criteria import OWN

    class Silent:
        """Evidence of nothing but the weights."""

        layers, seed, protected = 8, 0, frozenset[int]()

        def weights(self) -> Iterator[tuple[int, str, Any]]:
            yield from ((layer, "w", np.ones((2, 2))) for layer in range(8))

    for name, chooser in OWN.items():
        reads = False
        try:
            chooser.choose(2, Silent())  # type: ignore[arg-type]
        except AttributeError:
            reads = True
        assert getattr(chooser, "READS_TEXT", True) is reads, name


# --- org/model@revision -----------------------------------------------------------------------------------------------

TAKE_A_MODEL = {
    "profile": "MODEL -o p.json --data demo",
    "layers": "MODEL --data demo",
    "compare": "MODEL --drop 2 --data demo",
    "recipe": "MODEL --drop 2 -o r.yml --data demo",
    "prune": "MODEL out",
    "verify": "MODEL .",
    "run": "MODEL -o run --data demo",
    "heal": "MODEL out --data demo",
    "eval": "--model_args pretrained=MODEL --tasks lmprune_demo_facts",
    "sweep": "MODEL -o run --data demo",
    "bench": "demo MODEL",
    "check": "MODEL",
    "export": "MODEL m.gguf",
    "quantize": "MODEL out --quantization nf4",
    "draft": "MODEL",
    "show": "MODEL",
    "push": "MODEL user/cut",
}


LATE = ("eval", "sweep", "run")
"""Those that import the harness before they open a model."""


def test_all_commands_that_take_a_model_are_known() -> None:
    models = "A (model|recipe|checkpoint)|The recipe"
    taking = {
        name
        for name, command in COMMANDS.items()
        for parameter in command.params
        if parameter.param_type_name == "argument" and re.match(models, parameter.help)
    }
    assert taking | {"eval"} == set(TAKE_A_MODEL)


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=[pytest.mark.slow] * (name in LATE)) for name in TAKE_A_MODEL]
)
def test_every_command_asks_the_hub_for_the_revision_that_is_named(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def snapshot(repository: str, revision: str | None, patterns: Any, *, fetch: bool = True) -> Path:
        asked.append((repository, revision))
        raise ModelError("that is all")

    monkeypatch.setattr("lmprune.hub.snapshot", snapshot)
    monkeypatch.setattr("lmprune.hub.small", lambda name, revision, files, most=0: snapshot(name, revision, files))
    monkeypatch.chdir(tmp_path)
    words = TAKE_A_MODEL[command].replace("MODEL", "org/model@branch").split()
    with pytest.raises(LmpruneError, match="that is all"):
        command_line.run([command, *words])
    assert asked and set(asked) == {("org/model", "branch")}
