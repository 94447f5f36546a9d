"""The parts that commands are declared with: typer's, with options in panels, hidden aliases and one line an error."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
from click.shell_completion import CompletionItem
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from ..errors import RunInterruptedError, UsageError

# Titles under which help texts group commands and options.
CONVERT, CHECK, RUN_MODEL, TRY = "Convert", "Check", "Run the model", "Try out"
ARGUMENTS, TYPES, CONTENT, METADATA, RUN, REPORT = "Arguments", "Types", "Content", "Metadata", "Run", "Report"
PROMPT, RESULT, COMPARISON, SIZE, OPTIONS = "Prompt", "Result", "Comparison", "Size", "Options"
FORM, LOAD, MACHINE = "Form", "Load", "Machine"

# The commands that multiply matrices. For the others numpy's matrix library need not start a thread for every
# processor: on sixteen of them that takes a quarter of a second, and two seconds of their time.
MULTIPLYING_COMMANDS = frozenset({"forward", "compare", "imatrix"})
MATRIX_THREADS_VARIABLE = "OPENBLAS_NUM_THREADS"

Function = TypeVar("Function", bound=Callable[..., Any])


class Option(TyperOption):
    """An option that help shows in a panel, and that has ``aliases``, which are accepted and not shown.

    A default shows, unless it is that of a switch.
    """

    def __init__(
        self, declarations: Sequence[str], *, panel: str = OPTIONS, aliases: Sequence[str] = (), **attributes: Any
    ) -> None:
        if attributes.get("is_flag"):
            attributes.setdefault("default", False)
        attributes.setdefault("show_default", not isinstance(attributes.get("default"), bool | None))
        super().__init__(param_decls=list(declarations), rich_help_panel=panel, **attributes)
        self.panel = panel
        self.aliases = tuple(aliases)

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Accept the aliases too."""
        shown = self.opts
        self.opts = [*shown, *self.aliases]
        try:
            super().add_to_parser(parser, ctx)
        finally:
            self.opts = shown

    def flags(self, ctx: click.Context) -> str:
        """Return how the option is written: ``--threads N``, ``--draft keep|drop``, ``--quiet, -q``."""
        spelt = "/".join(", ".join(names) for names in (self.opts, self.secondary_opts) if names)
        if self.is_flag:
            return spelt
        choices = "|".join(map(str, self.type.choices)) if isinstance(self.type, click.Choice) else None
        return f"{spelt} {choices or self.metavar or self.make_metavar(ctx)}"

    def sentence(self) -> str:
        """Return the help text with the range and the default."""
        text = str(self.help)
        if isinstance(self.type, (click.IntRange, click.FloatRange)) and self.type.max is not None:
            text += f" From {self.type.min} to {self.type.max}."
        return f"{text} Default: {self.default}." if self.show_default else text


class Argument(TyperArgument):
    """An argument with a help text."""

    panel = ARGUMENTS

    def __init__(
        self, declarations: Sequence[str], *, description: str, required: bool = True, **attributes: Any
    ) -> None:
        super().__init__(
            param_decls=list(declarations),
            help=description,
            required=required,
            rich_help_panel=ARGUMENTS,
            **attributes,
        )
        self.description = description

    def flags(self, ctx: click.Context) -> str:
        """Return the name, in brackets where the argument can be left out."""
        return self.make_metavar(ctx)

    def sentence(self) -> str:
        """Return the help text."""
        return self.description


class _Described(click.Command):
    """What has a help text: it comes from ``help_text``: panels on a terminal, aligned plain text elsewhere."""

    def get_help(self, ctx: click.Context) -> str:
        """Return the help text for the place that it is printed to."""
        from .help import help_text
        from .terminal import is_terminal

        return help_text(self, ctx, rich=is_terminal())


class Command(_Described, TyperCommand):
    """A command, with an example for the end of its help, and answers to options that belong to another program."""

    def __init__(
        self,
        *args: Any,
        panel: str,
        example: str,
        answers: Mapping[str, str] | None = None,
        **attributes: Any,
    ) -> None:
        super().__init__(*args, **attributes)
        self.panel = panel
        self.example = example
        self.answers = answers or {}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, and answer an option of another program, or of the program as a whole, with what to use instead."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            program = ctx.parent
            if program is not None and any(error.option_name in param.opts for param in program.command.params):
                raise UsageError(
                    f"{error.option_name} belongs before the command",
                    hint=f"use {program.command_path} {error.option_name} {ctx.info_name} ...",
                ) from None
            answer = self.answers.get(error.option_name)
            if answer is None:
                raise
            raise UsageError(f"{error.option_name} is an option of convert_hf_to_gguf.py", hint=answer) from None


class Commands(_Described, TyperGroup):
    """The commands, each imported when it is asked for."""

    def __init__(self, *, modules: Mapping[str, str], **attributes: Any) -> None:
        super().__init__(**attributes)
        self.modules = modules

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order in which help lists them."""
        return list(self.modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command, None where there is none of that name."""
        if cmd_name not in self.modules:
            return None
        declared = vars(import_module(f".{self.modules[cmd_name]}", __package__)).values()
        return next(value for value in declared if isinstance(value, Command) and value.name == cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command to run, and keep numpy from starting threads for one that does not multiply."""
        found = super().resolve_command(ctx, args)
        if found[0] not in MULTIPLYING_COMMANDS:
            os.environ.setdefault(MATRIX_THREADS_VARIABLE, "1")
        return found

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; Ctrl-C in any of them is an error of ours."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise RunInterruptedError("interrupted") from None


def command(name: str, *, panel: str, example: str, answers: Mapping[str, str] | None = None) -> Callable[..., Command]:
    """Return a decorator that makes a command of a function; its docstring is the help text."""
    return click.command(name, cls=Command, panel=panel, example=example, answers=answers)


def option(*declarations: str, **attributes: Any) -> Callable[[Function], Function]:
    """Return a decorator that adds an option; see ``Option``."""
    return click.option(*declarations, cls=Option, **attributes)


def argument(name: str, *, description: str, **attributes: Any) -> Callable[[Function], Function]:
    """Return a decorator that adds an argument; see ``Argument``."""
    return click.argument(name, cls=Argument, description=description, **attributes)


class _FolderPath(click.Path):
    """A path for which shells complete folders only."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Ask the shell for folders."""
        return [CompletionItem(incomplete, type="dir")]


# Neither existence nor permissions are checked here: the errors of the commands say more.
PATH = click.Path(path_type=Path, readable=False)
FOLDER = _FolderPath(path_type=Path, readable=False)


def raise_usage_error(error: click.ClickException) -> NoReturn:
    """Raise an error of click as one of ours, on one line."""
    context = getattr(error, "ctx", None)
    if isinstance(error, click.MissingParameter) and error.param is not None:
        names = error.param.get_error_hint(context).replace("'", "")
        what = f"{error.param.param_type_name} {names} is missing"
    else:
        what = error.format_message().rstrip(".")
        what = what[:1].lower() + what[1:]
    path = "dsv4convert" if context is None else context.command_path
    raise UsageError(what, hint=f"see {path} -h") from None
