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
    callback = app.registered_callback
    before = _parameters(callback.callback)[2] if callback is not None and callback.callback is not None else []
    head = "\n".join([INTRODUCTION, "Before the command:", "", *before]) + "\n"
    sections = [_section(str(info.name), info.callback) for info in app.registered_commands if info.callback]
    return "\n".join([head, *sections, _exit_codes()])


def _section(name: str, command: Callable[..., Any]) -> str:
    usage, arguments, options = _parameters(command)
    head = [f"## {name}", "", " ".join((command.__doc__ or "").split()), ""]
    return "\n".join([*head, f"    dsv4convert {' '.join([name, *usage])}", "", *arguments, *options]) + "\n"


def _parameters(command: Callable[..., Any]) -> tuple[list[str], list[str], list[str]]:
    """Return what a usage line holds, and a line for each argument and for each option that is not hidden."""
    hints = typing.get_type_hints(command, include_extras=True)
    usage: list[str] = []
    arguments: list[str] = []
    options: list[str] = []
    for parameter in inspect.signature(command).parameters.values():
        kind, info = typing.get_args(hints[parameter.name])[:2]
        required = parameter.default is inspect.Parameter.empty
        if isinstance(info, ArgumentInfo):
            name = info.metavar or parameter.name.upper()
            usage.append(name if required else f"[{name}]")
            arguments.append(f"- `{usage[-1]}`: {_sentence(info.help)}")
        elif isinstance(info, OptionInfo) and not info.hidden:
            flags = _flags(parameter.name, kind, info)
            value = "" if kind is bool else f" {info.metavar or _values(kind)}"
            if required:
                usage.append(flags + value)
            details = _range(info) if required else _default(parameter.default, flags) + _range(info)
            options.append(f"- `{flags}{value}`: {_sentence(info.help)}{details}")
    return usage, arguments, options


def _flags(name: str, kind: Any, info: OptionInfo) -> str:
    # Typer keeps the first declaration of an annotated option in the place of its default.
    declared = [text for text in (info.default, *(info.param_decls or ())) if isinstance(text, str)]
    own = name.replace("_", "-")
    return ", ".join(declared or [f"--{own}/--no-{own}" if kind is bool else f"--{own}"])


def _values(kind: Any) -> str:
    """Return how the value of an option looks: its choices, or VALUE; of an optional or repeated one, those within."""
    for inner in (kind, *typing.get_args(kind)):
        if isinstance(inner, type) and issubclass(inner, Enum):
            return "|".join(str(member.value) for member in inner)
    return "VALUE"


def _range(info: OptionInfo) -> str:
    if info.min is not None and info.max is not None:
        return f" From {info.min:g} to {info.max:g}."
    if info.min is not None:
        return f" At least {info.min:g}."
    return "" if info.max is None else f" At most {info.max:g}."


def _sentence(text: str | None) -> str:
    text = " ".join((text or "").split())
    return text if text.endswith(".") else text + "."


def _default(value: Any, flags: str) -> str:
    on, _, off = flags.partition("/")
    if isinstance(value, bool):
        return f" Default: {(on if value else off).removeprefix('--')}." if off else ""
    return "" if value is None or value == () else f" Default: {getattr(value, 'value', value)}."


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
