"""The command line: one thin command per stage. An `LmpruneError` becomes one line on stderr and an exit code.

Exit codes: 0 done, 1 a mistake that the message explains, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from typer import _click

from lmprune import __version__
from lmprune.cli import bench, demo, evaluate, heal, plot, profile, prune, recipe, report, support, sweep, verify
from lmprune.errors import LmpruneError
from lmprune.quiet import quiet_hosts

app = typer.Typer(
    name="lmprune",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Find the layers that a language model hardly needs, cut them, heal the cut and prove what is left.",
)


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


for _command in (profile.profile, recipe.recipe, prune.prune, verify.verify, heal.heal, plot.plot, support.support):
    app.command(no_args_is_help=False)(_command)
app.command("eval", context_settings=evaluate.PASS_THROUGH, add_help_option=False)(evaluate.evaluate)
app.command()(evaluate.tasks)
app.command()(sweep.sweep)
app.command()(bench.bench)
app.command()(report.report)
app.command()(demo.demo)


def _usage_line(exc: _click.exceptions.ClickException) -> str:
    """What is wrong with the words that were typed, in one line, with the value where there is one."""
    line = " ".join(exc.format_message().split()).rstrip(".")
    context = getattr(exc, "ctx", None)
    options = getattr(getattr(exc, "param", None), "opts", ())
    given = next((value for option, value in zip(sys.argv, sys.argv[1:]) if option in options), None)
    if given is not None and given not in line:
        line += f", not {given!r}"
    return f"{line}. See `{context.command_path if context else 'lmprune'} --help`"


def main() -> None:
    """Run the command line and leave with its exit code."""
    try:
        code = app(standalone_mode=False)
    except LmpruneError as exc:
        if os.environ.get("LMPRUNE_DEBUG"):
            raise
        print(f"lmprune: {exc}", file=sys.stderr)
        code = exc.exit_code
    except _click.exceptions.ClickException as exc:
        print(f"lmprune: {_usage_line(exc)}", file=sys.stderr)
        code = exc.exit_code
    except (typer.Abort, KeyboardInterrupt):
        print("lmprune: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)
