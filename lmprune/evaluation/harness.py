"""The harness as our commands call it: its own command line, with our model and tasks already known to it."""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from lmprune import hub
from lmprune.errors import ModelError, UsageError, check_keys, nearest
from lmprune.evaluation.failing import in_our_words
from lmprune.files import as_path
from lmprune.models.cut import check_name, check_recipe
from lmprune.tasks_folder import tasks_folder

_COMMANDS = ("ls", "validate", "run")
"""What lm_eval's command line knows; without one of them it runs."""
_PASSED_ON = {
    *("attn_implementation", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "cache_dir"),
    *("device_map", "gpus", "llm_int8_enable_fp32_cpu_offload", "llm_int8_skip_modules", "llm_int8_threshold"),
    *(
        "load_in_4bit",
        "load_in_8bit",
        "low_cpu_mem_usage",
        "max_memory",
        "quantization",
        "recipe",
        "token",
        "use_safetensors",
    ),
}
"""Keys of ``--model_args`` besides those that the harness's own model names."""


def run_command_line(arguments: Sequence[str]) -> None:
    """Run ``lm_eval`` with ``arguments``; the model defaults to ours and our tasks are always found.

    Raises:
        UsageError: the harness does not understand the arguments, or knows no such task.
        HostError: the harness failed.
    """
    command, *words = arguments if arguments and arguments[0] in _COMMANDS else ("run", *arguments)
    if command == "run":
        named = _asked(words, "--model", "-M")
        if not named or _is_ours(words):
            check_model_args(words)
        words = words if named else ["--model", "lmprune", *words]
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    argv = sys.argv
    try:
        # Its parser reads nothing else. Our tasks are added after parsing, for its option knows one folder only.
        sys.argv = ["lmprune eval", command, *words]
        harness = HarnessCLI()
        with _one_line(harness):
            parsed = harness.parse_args()
        theirs = getattr(parsed, "include_path", None)
        parsed.include_path = [str(tasks_folder()), *([theirs] if theirs else [])]
        if command == "run":
            import lmprune.evaluation.plugin  # noqa: F401  (registers the model, so that no shim is needed)
        with in_our_words():
            harness.execute(parsed)
    finally:
        sys.argv = argv


def _asked(words: Sequence[str], *names: str) -> bool:
    return any(word in names or word.startswith(f"{names[0]}=") for word in words)


def _is_ours(words: Sequence[str]) -> bool:
    """Whether the last ``--model`` is our own."""
    named = [word.partition("=")[2] for word in words if word.startswith("--model=")]
    named += [value for word, value in zip(words, words[1:]) if word in ("--model", "-M")]
    return named[-1:] == ["lmprune"]


def check_model_args(words: Sequence[str]) -> None:
    """Make sure that our model is told what to open, by keys that it knows, and that this is there.

    No host is imported for that, whose list of tasks alone takes seconds.

    Raises:
        UsageError: it is not, or there is no such key (names the nearest).
        ModelError, RecipeError: there is no such model, recipe or adapter.
    """
    if _asked(words, "--config", "-C"):
        return
    given, taken = [], False
    for word in words:
        option, _, value = word.partition("=")
        if word.startswith("-"):
            taken = option in ("--model_args", "-a")
            given += [value] if taken and value else []
        elif taken:
            given.append(word)
    told = _told(given)
    if near := next((w for w in words if not given and get_close_matches(w, ["--model_args"], cutoff=0.8)), None):
        raise UsageError(f"no option {near} (did you mean '--model_args'?)")
    if not given:
        raise UsageError(f"which model? Give --model_args pretrained=MODEL{'' if words else ' and --tasks T,...'}")
    check_keys(told, sorted({"pretrained", *_own_keys(), *_PASSED_ON}), "--model_args", UsageError)
    if "pretrained" not in told:
        raise UsageError(f"--model_args {','.join(given)}: which model? Add pretrained=MODEL")
    for key, check in (("pretrained", check_name), ("recipe", check_recipe), ("peft", _check_adapter)):
        if isinstance(told.get(key), str) and told[key]:
            check(told[key])


def _told(given: Sequence[str]) -> dict[str, Any]:
    """What the harness reads in the words behind ``--model_args``: JSON, or keys and values."""
    with suppress(ValueError):
        if given and isinstance(data := json.loads(given[0]), dict):
            return data
    return {key: value for word in given for key, value in re.findall(r"(?:^|,)\s*(\w+)=([^,]*)", word)}


def _check_adapter(name: str) -> None:
    if not as_path(name).is_dir() and not hub.is_id(name):
        raise ModelError(f"no adapter at {name!r}: give a folder or a Hub id as peft=ADAPTER")


def _own_keys() -> set[str]:
    """What the harness's model can be told, read from its source: to import it takes seconds."""
    package = find_spec("lm_eval")
    path = Path(str(package.origin)).parent / "models" / "huggingface.py" if package is not None else Path()
    if not path.is_file():
        return set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__" and len(node.args.args) > len(_PASSED_ON) // 2:
            return {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)} - {"self"}
    return set()


@contextmanager
def _one_line(harness: Any) -> Iterator[None]:
    """Within the block, what the harness's parser does not understand becomes one line, with the nearest option."""
    known = [option for parser in harness._subparsers.choices.values() for option in parser._option_string_actions]

    def error(parser: Any, message: str) -> NoReturn:
        word = next((word for word in message.split() if word.startswith("-")), "")
        close = nearest(word.partition("=")[0], known) if message.startswith("unrecognized") else ""
        raise UsageError(f"lm_eval: {message}{close}. See `lm_eval run --help`")

    before = argparse.ArgumentParser.error
    argparse.ArgumentParser.error = error  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        argparse.ArgumentParser.error = before  # type: ignore[method-assign]


def evaluate(
    model: str | Path | Mapping[str, Any],
    tasks: str | Sequence[str],
    *,
    batch_size: int | str = 32,
    limit: int | None = None,
    include_path: str | Path | None = None,
) -> dict[str, Any]:
    """Evaluate one model by our plugin on ``tasks``, without a word, and return the harness's results.

    Args:
        model: what may stand in a model's place; or the harness's model_args, such as ``pretrained`` and ``recipe``.
            Tasks are given these too, as on the harness's command line: the normalised loss needs the tokenizer.
        tasks: names of tasks or groups; ours are always found.
        limit: documents of each task, at most.
        include_path: a folder with tasks of one's own.

    Raises:
        UsageError: a task does not exist.
        HostError: the harness failed.
    """
    import lm_eval
    import torch

    from lmprune.evaluation.indexing import manager_of
    from lmprune.evaluation.loaded import quiet_harness
    from lmprune.evaluation.plugin import LmpruneLM

    model_args = dict(model) if isinstance(model, Mapping) else {"pretrained": str(model)}
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    manager = manager_of(tasks, model_args, include_path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with quiet_harness(bars=False), in_our_words():
        live = LmpruneLM(**{"device": device, "batch_size": batch_size} | model_args)
        results: dict[str, Any] = lm_eval.simple_evaluate(
            model=live,
            tasks=tasks,
            task_manager=manager,
            limit=limit,
            log_samples=False,
            bootstrap_iters=1000,
        )
    return results
