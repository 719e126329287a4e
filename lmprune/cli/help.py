"""The help of a command: its own words and examples, then arguments, options and commands, by headings."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from textwrap import wrap
from typing import Any

from typer.core import TyperCommand, TyperGroup

from lmprune.cli import show

# typer's own help boxes three columns or more, in which 80 characters cut long options off.
WORDS = 30
"""Width of the left column at most; longer ones break between words."""
_EXAMPLES = "Examples:"
_GOES_ON = " \\"


class Command(TyperCommand):
    """A command whose help is ours."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(_help(self, ctx, ()) + "\n")


class Group(TyperGroup):
    """The command of all commands, likewise."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        known = [command for name in self.list_commands(ctx) if (command := self.get_command(ctx, name))]
        formatter.write(_help(self, ctx, known) + "\n")


def examples(text: str) -> list[str]:
    """The command lines under the heading of examples in a command's text."""
    lines = inspect.cleandoc(text).partition(_EXAMPLES)[2].splitlines()
    return [line.strip() for line in lines if line.strip()]


def first_line(text: str) -> str:
    """What a command does, in a sentence."""
    return " ".join(inspect.cleandoc(text).split("\n\n")[0].split())


def _help(command: Any, context: Any, commands: Sequence[Any]) -> str:
    from rich.text import Text

    usage = " ".join((context.command_path, *command.collect_usage_pieces(context)))
    parts: list[Any] = [Text(f"Usage: {usage}"), ""]
    told = inspect.cleandoc(command.help or "")
    for paragraph in told.partition(_EXAMPLES)[0].strip().split("\n\n"):
        parts += [Text(" ".join(paragraph.split())), ""]
    if lines := examples(told):
        parts += [Text(_EXAMPLES, style="bold"), *(Text(part) for line in lines for part in _pasteable(line)), ""]
    parameters = command.get_params(context)
    for kind, title in (("argument", "Arguments"), ("option", "Options")):
        found = [p for p in parameters if p.param_type_name == kind]
        parts += _sections(title, ((p, p.get_help_record(context)) for p in found))
    listed = ((each, (str(each.name), first_line(each.help or ""))) for each in commands)
    return show.render(*parts, *_sections("Commands", listed)).rstrip("\n")


def _pasteable(line: str) -> list[str]:
    """A command line in parts that a shell takes for one."""
    parts = wrap(line, show.width() - 6, break_long_words=False, break_on_hyphens=False)
    first, rest = f"  {parts[0]}", [f"    {part}" for part in parts[1:]]
    return [part + _GOES_ON for part in (first, *rest)[:-1]] + [(first, *rest)[-1]]


def _sections(title: str, records: Iterable[tuple[Any, tuple[str, str] | None]]) -> list[Any]:
    """One section for each heading, the one without first."""
    panels: dict[str, list[tuple[str, str]]] = {title: []}
    for owner, record in records:
        if record is not None:
            panels.setdefault(getattr(owner, "rich_help_panel", None) or title, []).append(record)
    return [part for heading, found in panels.items() for part in _section(heading, found)]


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
