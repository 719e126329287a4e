"""All commands, and how the words that were typed reach them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.main import get_command

from lmprune import __version__
from lmprune.cli import (
    bench,
    check,
    compare,
    demo,
    draft,
    evaluate,
    export,
    heal,
    look,
    plot,
    profile,
    prune,
    push,
    quantize,
    recipe,
    report,
    show,
    support,
    sweep,
    verify,
)
from lmprune.cli import run as run_all
from lmprune.cli.help import Command, Group
from lmprune.errors import UsageError
from lmprune.quiet import quiet_hosts

app = typer.Typer(
    name="lmprune",
    cls=Group,
    rich_markup_mode=None,  # we write help and errors ourselves
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find the layers that a language model hardly needs, cut them, heal the cut and prove what is left.",
)


COMPLETE = "_LMPRUNE_COMPLETE"
"""The environment variable by which a shell asks for completions."""


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lmprune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    quiet_hosts()


COMMANDS = {
    "Choose and cut": (
        profile.profile,
        compare.layers,
        compare.compare,
        recipe.recipe,
        prune.prune,
        verify.verify,
        run_all.run,
    ),
    "Repair and heal": (heal.heal,),
    "Measure and show": (evaluate.tasks, sweep.sweep, bench.bench, report.report, plot.plot),
    "Run elsewhere": (check.check, export.export, quantize.quantize, draft.draft, support.support),
    "Share": (look.show, look.recipes, push.push),
    "First look": (demo.demo,),
}
"""By heading of the help, in the order of use."""

for _panel, _commands in COMMANDS.items():
    if evaluate.tasks in _commands:
        app.command("eval", cls=Command, rich_help_panel=_panel, context_settings=evaluate.PASS_THROUGH)(
            evaluate.evaluate
        )
    for _command in _commands:
        app.command(_command.__name__, cls=Command, rich_help_panel=_panel)(_command)


def run(words: Sequence[str]) -> int:
    """Run the command that ``words`` spell, the help without any; the exit code.

    Raises:
        UsageError: there is no such command, option or value.
        KeyboardInterrupt, LmpruneError: as they come.
    """
    command = get_command(app)
    if COMPLETE in os.environ:
        command.main(list(words), prog_name="lmprune")
    try:
        # Not `app()`, which prints errors in its own way and turns an interruption into a mere exit code.
        with show.speaking(), command.make_context("lmprune", list(words) or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as exc:
        return int(exc.exit_code)
    except typer.Abort as exc:
        raise KeyboardInterrupt from exc
    except Exception as exc:
        # Click's errors, which typer has moved between packages: they are known by what they can do.
        if not hasattr(exc, "format_message"):
            raise
        raise UsageError(_usage_line(exc, words)) from exc
    return 0


def _usage_line(exc: Any, words: Sequence[str]) -> str:
    """What is wrong with the words that were typed, in one line, with the value where there is one."""
    line = " ".join(exc.format_message().split()).rstrip(".").replace(": Value error, ", ": ")
    context = getattr(exc, "ctx", None)
    options = getattr(getattr(exc, "param", None), "opts", ())
    given = next((value for option, value in zip(words, words[1:]) if option in options), None)
    if given is not None and given not in line:
        line += f", not {given!r}"
    return f"{line}. See `{context.command_path if context else 'lmprune'} --help`"
