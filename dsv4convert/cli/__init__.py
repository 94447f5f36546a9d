"""The command line: parses, calls the library, prints; no tensor work happens here.

Each module of this package holds the commands of one subject and registers them on the app.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import Dsv4Error, RunInterruptedError, SpaceError, escape_control

# The commands that multiply matrices. For the others numpy's matrix library need not start a thread for every
# processor: on sixteen of them that takes a quarter of a second, and two seconds of their time.
MULTIPLYING_COMMANDS = frozenset({"forward", "compare"})
MATRIX_THREADS_VARIABLE = "OPENBLAS_NUM_THREADS"


class _Commands(TyperGroup):
    """The commands; a Ctrl-C in any of them is an error of ours, which typer would end without a word."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        found = super().resolve_command(ctx, args)
        if found[0] not in MULTIPLYING_COMMANDS:
            os.environ.setdefault(MATRIX_THREADS_VARIABLE, "1")
        return found

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise RunInterruptedError("interrupted") from None


app = typer.Typer(
    name="dsv4convert",
    cls=_Commands,
    help="Convert DeepSeek-V4 checkpoints: safetensors to GGUF, model-parallel shards, BF16 and FP8.",
    no_args_is_help=True,
    # Plain help: rich would take longer to load than everything else together.
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERNAL_ERROR_CODE = 70

# What ends a program politely: an administrator, a batch system, a terminal that was closed.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)

# Objects made between two searches for unreachable cycles. A plan is made of objects that live to the end, and
# with the default of 700 a command spends a tenth of its start on searching them in vain.
GC_THRESHOLD = (100_000, 20, 20)

_debug = False


def _version(wanted: bool) -> None:
    if wanted:
        from ..formats.backend import describe_codecs

        typer.echo(f"dsv4convert {__version__}, {describe_codecs()}")
        raise typer.Exit


@app.callback()
def _global_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    global _debug
    _debug = debug


def register_commands() -> None:
    """Add the commands of every module, in the order in which ``--help`` lists them; once."""
    if app.registered_commands:
        return
    from . import demo, folders, forward, gguf, inspect, shard, synth, verify

    for module in (gguf, shard, folders, verify, inspect, forward, synth, demo):
        module.register(app)


def main() -> None:
    """Run the program: every error becomes one line on stderr and its own exit code."""
    _heed_stop_signals()
    gc.set_threshold(*GC_THRESHOLD)
    try:
        register_commands()
        app()
    except Dsv4Error as error:
        if _debug:
            raise
        _fail(error)
    except KeyboardInterrupt:
        _fail(RunInterruptedError("interrupted"))
    except MemoryError:
        if _debug:
            raise
        _fail(SpaceError("not enough memory", hint="give fewer --threads, or is a file not what its name says?"))
    except BrokenPipeError:
        # Whoever read our output has enough; keep Python from flushing into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:  # the last resort: a bug of ours, and still no traceback for the user
        if _debug:
            raise
        sys.stderr.write(
            f"internal error: {type(error).__name__}: {escape_control(str(error))}; "
            "this is a bug: please report it with the output of --debug\n"
        )
        sys.exit(INTERNAL_ERROR_CODE)


def _fail(error: Dsv4Error) -> NoReturn:
    sys.stderr.write(f"error: {error}\n")
    sys.exit(error.exit_code)


def _heed_stop_signals() -> None:
    """Treat the signals that end a program politely like Ctrl-C, so that the work is kept."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for number in STOP_SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup has SIGHUP ignored: it stays so
            signal.signal(number, stop)
