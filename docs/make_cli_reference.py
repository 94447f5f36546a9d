"""Writes docs/cli.md from the program's own commands: python docs/make_cli_reference.py."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

from typer.models import ArgumentInfo, OptionInfo

from dsv4convert.cli import app, register_commands
from dsv4convert.errors import Dsv4Error

HERE = Path(__file__).resolve().parent
INTRODUCTION = """# The command line

Made by `python docs/make_cli_reference.py` from the program's own help; a test keeps it so.

Every error is one line on stderr that says what is wrong, where, what was expected, what was found and
what to do next; `dsv4convert --debug COMMAND ...` shows the traceback behind it. Progress goes to stderr
(a bar on a terminal, a line every ten seconds elsewhere), results to stdout.
"""


def reference() -> str:
    """Return the text of docs/cli.md."""
    register_commands()
    sections = [_section(str(info.name), info.callback) for info in app.registered_commands if info.callback]
    return "\n".join([INTRODUCTION, *sections, _exit_codes()])


def _section(name: str, command: Callable[..., Any]) -> str:
    hints = typing.get_type_hints(command, include_extras=True)
    usage, arguments, options = [name], [], []
    for parameter in inspect.signature(command).parameters.values():
        kind, info = typing.get_args(hints[parameter.name])[:2]
        required = parameter.default is inspect.Parameter.empty
        if isinstance(info, ArgumentInfo):
            metavar = parameter.name.upper() if required else f"[{parameter.name.upper()}]"
            usage.append(metavar)
            arguments.append(f"- `{metavar}`: {_sentence(info.help)}")
        elif isinstance(info, OptionInfo):
            # Typer keeps the first declaration of an annotated option in the place of its default.
            declared = [text for text in (info.default, *(info.param_decls or ())) if isinstance(text, str)]
            flags = ", ".join(declared or [f"--{parameter.name.replace('_', '-')}"])
            if required:
                usage.append(f"{flags} {_values(kind)}")
            options.append(
                f"- `{flags}{_metavar(kind)}`: {_sentence(info.help)}{'' if required else _default(parameter.default)}"
            )
    head = [f"## {name}", "", " ".join((command.__doc__ or "").split()), "", f"    dsv4convert {' '.join(usage)}", ""]
    return "\n".join([*head, *arguments, *options]) + "\n"


def _values(kind: Any) -> str:
    """Return how the value of an option looks: its choices, or VALUE; of an optional or repeated one, those within."""
    for inner in (kind, *typing.get_args(kind)):
        if isinstance(inner, type) and issubclass(inner, Enum):
            return "|".join(str(member.value) for member in inner)
    return "VALUE"


def _metavar(kind: Any) -> str:
    return "" if kind is bool else f" {_values(kind)}"


def _sentence(text: str | None) -> str:
    text = " ".join((text or "").split())
    return text if text.endswith(".") else text + "."


def _default(value: Any) -> str:
    if value is None or isinstance(value, bool) or value == ():
        return ""
    return f" Default: {getattr(value, 'value', value)}."


def _exit_codes() -> str:
    kinds = sorted(_subclasses(Dsv4Error), key=lambda kind: kind.exit_code)
    rows = [f"| {kind.exit_code} | {(kind.__doc__ or '').splitlines()[0]} |" for kind in kinds]
    return "\n".join(
        ["## Exit codes", "", "| code | what |", "|---|---|", "| 0 | Done. |", *rows, "| 70 | A bug of ours. |", ""]
    )


def _subclasses(kind: type[Dsv4Error]) -> list[type[Dsv4Error]]:
    return [k for direct in kind.__subclasses__() for k in (direct, *_subclasses(direct))]


if __name__ == "__main__":
    (HERE / "cli.md").write_text(reference(), encoding="utf-8")
