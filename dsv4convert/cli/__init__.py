"""The command line: parses, calls the library, prints; no tensor work happens here.

Each module of this package holds the commands of one subject, and is imported when one of them is run.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

import click
import typer

from .. import __version__
from ..errors import Dsv4Error, RunInterruptedError, SpaceError, UsageError, escape_control
from .parsing import Commands, Option, raise_usage_error
from .saying import drop_unsaid, errors_of_the_system, say, silence_stdout, watched_stdout

PROGRAM = "dsv4convert"

# Command -> module of this package that holds it; help lists the commands in this order.
MODULES = {
    "hf-to-gguf": "gguf",
    "merge": "gguf",
    "shard": "shard",
    "unshard": "shard",
    "dequantize": "folders",
    "repack": "folders",
    "requantize": "folders",
    "mend": "mend",
    "mlx": "mlx",
    "maxtext": "maxtext",
    "verify": "verify",
    "check": "check",
    "inspect": "inspect",
    "estimate": "estimate",
    "forward": "forward",
    "compare": "compare",
    "imatrix": "imatrix",
    "synth": "synth",
    "demo": "demo",
}

# Set by the scripts that --show-completion prints, when a shell asks for completions.
COMPLETION_VARIABLE = "_DSV4CONVERT_COMPLETE"
SHELLS = ("bash", "zsh", "fish")

INTERNAL_ERROR_CODE = 70

# What ends a program politely: an administrator, a batch system, a terminal that was closed.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)

_debug = False


def _print_version(ctx: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted:
        from ..formats.backend import describe_codecs

        typer.echo(f"{PROGRAM} {__version__}, {describe_codecs()}")
        ctx.exit()


def _print_completion(ctx: click.Context, option: click.Parameter, shell: str | None) -> None:
    if shell is not None:
        from click.shell_completion import get_completion_class

        kind = get_completion_class(shell)
        if kind is None:
            raise UsageError(f"no completion for {shell}", expected=", ".join(SHELLS))
        typer.echo(kind(app, {}, PROGRAM, COMPLETION_VARIABLE).source())
        ctx.exit()


def _keep_debug(ctx: click.Context, option: click.Parameter, debug: bool) -> None:
    global _debug
    _debug = debug


app = Commands(
    name=PROGRAM,
    modules=MODULES,
    help="Convert DeepSeek-V4 checkpoints: safetensors to GGUF, model-parallel shards, BF16, FP8, NVFP4, MLX and "
    "MaxText.",
    context_settings={"help_option_names": ["-h", "--help"]},
    params=[
        Option(
            ["--debug"], is_flag=True, expose_value=False, callback=_keep_debug, help="Show the traceback of an error."
        ),
        Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_version,
            help="Show the version and the codecs in use, and exit.",
        ),
        Option(
            ["--show-completion"],
            type=click.Choice(SHELLS),
            is_eager=True,
            expose_value=False,
            callback=_print_completion,
            help='Print the completion script of a shell and exit; for bash: eval "$(dsv4convert --show-completion '
            'bash)" in ~/.bashrc.',
        ),
    ],
)


def main() -> None:
    """Run the program: every error becomes one line on stderr and its own exit code."""
    _heed_stop_signals()
    try:
        run(sys.argv[1:])
    except Dsv4Error as error:
        if _debug:
            raise
        _fail(error)
    except KeyboardInterrupt:
        _fail(RunInterruptedError("interrupted"))
    except MemoryError:
        if _debug:
            raise
        _fail(
            SpaceError("not enough memory", hint="use fewer --threads; a corrupt file can also ask for too much memory")
        )
    except BrokenPipeError:
        silence_stdout()  # whoever read the output has enough
        sys.exit(0)
    except Exception as error:  # the last resort: a bug of ours, and still no traceback for the user
        if _debug:
            raise
        say(
            f"internal error: {type(error).__name__}: {escape_control(str(error))}; "
            "this is a bug: please report it with the output of --debug"
        )
        sys.exit(INTERNAL_ERROR_CODE)
    finally:
        drop_unsaid()


def run(arguments: list[str]) -> None:
    """Run the command that the arguments name, or print the completions that a shell asks for.

    Raises:
        SystemExit: the program ends, with this exit code.
        Dsv4Error: arguments that are wrong, or what the command raises.
    """
    instruction = os.environ.get(COMPLETION_VARIABLE)
    if instruction:
        from click.shell_completion import shell_complete

        sys.exit(shell_complete(app, {}, PROGRAM, COMPLETION_VARIABLE, instruction))
    try:
        with (
            watched_stdout(),
            errors_of_the_system(),
            app.make_context(PROGRAM, arguments or ["--help"]) as context,
        ):
            app.invoke(context)
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except click.ClickException as error:
        raise_usage_error(error)


def _fail(error: Dsv4Error) -> NoReturn:
    say(f"error: {error}")
    sys.exit(error.exit_code)


def _heed_stop_signals() -> None:
    """Treat the signals that end a program politely like Ctrl-C, so that the work is kept."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for number in STOP_SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup has SIGHUP ignored: it stays so
            signal.signal(number, stop)
