"""Help texts: panels where stdout is a terminal, aligned plain text elsewhere. Nothing is cut."""

from __future__ import annotations

import inspect
import io
import re
import textwrap
from typing import TYPE_CHECKING

import click

from .parsing import OPTIONS, Argument, Command, Commands, Option
from .terminal import MAX_HELP_WIDTH, width

if TYPE_CHECKING:
    from rich.console import RenderableType

# Title -> rows of what is written, and what it does.
Panels = dict[str, list[tuple[str, str]]]

# Of the left column; a longer entry has its explanation on the next line.
MAX_LEFT = 34
HELP_OPTION = ("--help, -h", "Show this help and exit.")


def help_text(command: click.Command, ctx: click.Context, *, rich: bool) -> str:
    """Return the help of a command or of the program."""
    return _rich(command, ctx) if rich else _plain(command, ctx)


def panels(command: click.Command, ctx: click.Context) -> Panels:
    """Return what a command has, grouped: arguments and options, or of the program its commands."""
    found: Panels = {}
    if isinstance(command, Commands):
        for name in command.list_commands(ctx):
            subcommand = command.get_command(ctx, name)
            if isinstance(subcommand, Command):
                found.setdefault(subcommand.panel, []).append((name, description(subcommand)))
    for parameter in command.params:
        if isinstance(parameter, Argument) or (isinstance(parameter, Option) and not parameter.hidden):
            found.setdefault(parameter.panel, []).append((parameter.flags(ctx), parameter.sentence()))
    last = next(reversed(found)) if found else OPTIONS
    found.setdefault(last, []).append(HELP_OPTION)
    return found


def description(command: click.Command) -> str:
    """Return the docstring of a command as one paragraph."""
    return " ".join(inspect.cleandoc(command.help or "").split())


def usage(command: click.Command, ctx: click.Context) -> str:
    """Return how to call a command, its required options included."""
    required = [
        parameter.flags(ctx) for parameter in command.params if isinstance(parameter, Option) and parameter.required
    ]
    pieces = command.collect_usage_pieces(ctx)
    return " ".join([ctx.command_path, *pieces[:1], *required, *pieces[1:]])


def _example(command: click.Command) -> str | None:
    return command.example if isinstance(command, Command) else None


def _plain(command: click.Command, ctx: click.Context) -> str:
    columns = min(width(), MAX_HELP_WIDTH)

    def wrap(text: str, first: str, rest: str) -> list[str]:
        return textwrap.wrap(
            text, columns, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False
        )

    lines = wrap(usage(command, ctx), "Usage: ", " " * 7)
    lines += ["", *wrap(description(command), "  ", "  ")]
    for title, rows in panels(command, ctx).items():
        left = min(MAX_LEFT, max(len(row[0]) for row in rows))
        lines += ["", f"{title}:"]
        for flags, sentence in rows:
            indent = " " * (left + 4)
            wrapped = wrap(sentence, indent, indent)
            if len(flags) <= left:
                lines.append(f"  {flags:<{left}}  {wrapped[0].strip()}")
                wrapped = wrapped[1:]
            else:
                lines.append(f"  {flags}")
            lines += wrapped
    example = _example(command)
    if example is not None:
        lines += ["", f"Example: {example}"]
    return "\n".join(lines)


def _folded(flags: str) -> str:
    """Return what is too long for the left column on several lines, broken between words and between choices."""
    lines = [""]
    for piece in re.findall(r"[^ |]+[ |]?", flags):
        if len(lines[-1]) + len(piece.rstrip()) > MAX_LEFT:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _rich(command: click.Command, ctx: click.Context) -> str:
    from rich.console import Console, Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    columns = min(width(), MAX_HELP_WIDTH)
    console = Console(file=io.StringIO(), force_terminal=True, width=columns, highlight=False)
    parts: list[RenderableType] = [
        Text.assemble(("Usage: ", "bold"), usage(command, ctx)),
        Text(""),
        Text(description(command)),
        Text(""),
    ]
    for title, rows in panels(command, ctx).items():
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(max_width=MAX_LEFT)
        table.add_column(ratio=1)
        for flags, sentence in rows:
            table.add_row(Text(_folded(flags), style="cyan"), Text(sentence))
        parts.append(Panel(table, title=title, title_align="left", border_style="dim"))
    example = _example(command)
    if example is not None:
        parts.append(Text.assemble(("Example: ", "bold"), example))
    with console.capture() as capture:
        console.print(Group(*parts))
    return capture.get().rstrip("\n")
