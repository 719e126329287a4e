"""The help of a command: its own words, then arguments, options and commands in two columns."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

from lmprune.cli import show

# typer's own help boxes three columns or more, in which 80 characters cut long options off.
WORDS = 30
"""Width of the left column at most; longer ones break between words."""


class Command(TyperCommand):
    """A command whose help is ours."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(_help(self, ctx, []) + "\n")


class Group(TyperGroup):
    """The command of all commands, likewise."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        names = self.list_commands(ctx)
        known = [(name, command.get_short_help_str(1000)) for name in names if (command := self.get_command(ctx, name))]
        formatter.write(_help(self, ctx, known) + "\n")


def _help(command: Any, context: Any, commands: Sequence[tuple[str, str]]) -> str:
    from rich.text import Text

    usage = " ".join((context.command_path, *command.collect_usage_pieces(context)))
    parts: list[Any] = [Text(f"Usage: {usage}"), ""]
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        parts += [Text(" ".join(paragraph.split())), ""]
    parameters = command.get_params(context)
    for title, kind in (("Arguments", "argument"), ("Options", "option")):
        records = (p.get_help_record(context) for p in parameters if p.param_type_name == kind)
        parts += _section(title, [record for record in records if record])
    return show.render(*parts, *_section("Commands", commands)).rstrip("\n")


def _section(title: str, records: Sequence[tuple[str, str]]) -> list[Any]:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    if not records:
        return []
    listed = Table(box=None, padding=(0, show.GAP, 0, 0), pad_edge=False, show_header=False)
    listed.add_column(style="cyan", max_width=WORDS, overflow="fold")
    listed.add_column()
    for words, meaning in records:
        listed.add_row(Text(words), Text(meaning))
    return [Text(f"{title}:", style="bold"), Padding(listed, (0, 0, 0, 2)), ""]
