"""What is told to people and to the shell, and what becomes of it where nobody can be told."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, TypeVar, cast

import typer

from ..errors import (
    Dsv4Error,
    FileFormatError,
    InputMissingError,
    InputOutputError,
    OutputExistsError,
    ReportError,
    SpaceError,
    UsageError,
    escape_control,
)

T = TypeVar("T")

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_TOO_MANY_FILES = frozenset({errno.EMFILE, errno.ENFILE})


def json_text(document: Any) -> str:
    """Return a JSON document as commands print it."""
    return json.dumps(document, indent=2, ensure_ascii=False)


def print_json(document: Any) -> None:
    """Print a JSON document on stdout."""
    typer.echo(json_text(document))


def say(line: str) -> None:
    """Write a line on stderr; where that is closed or full, nobody can be told, and the exit code has to do."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def silence_stdout() -> None:
    """Keep Python from writing into a closed or full stdout when it exits."""
    _silence(sys.stdout)


def drop_unsaid() -> None:
    """Drop what stderr did not take: Python would try again when it exits, and change the exit code."""
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except (OSError, ValueError):
        _silence(sys.stderr)


def _silence(stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


class _WatchedStdout:
    """A stdout whose failures are errors of ours, whichever command writes to it, and however.

    Once one write failed, all do: somebody may have caught the first error, and part of a report is none.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._lost: ReportError | None = None

    def write(self, text: str) -> int:
        """Write, or say that the report could not be told."""
        if text == "":  # a probe, of what kind of stream this is
            return 0
        if self._stream is None:
            raise ReportError("the work is done, and stdout is closed: its report cannot be told", hint="use --quiet")
        with self._failures():
            return self._stream.write(text)

    def flush(self) -> None:
        """Flush, or say that the report could not be told."""
        if self._stream is not None:
            with self._failures():
                self._stream.flush()

    def isatty(self) -> bool:
        """Return whether it is a terminal."""
        return self._stream is not None and self._stream.isatty()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn what stdout refuses into one of our errors; a reader that has enough is none.

        Raises:
            ReportError: stdout is closed or full.
        """
        if self._lost is not None:
            raise self._lost
        try:
            yield
        except BrokenPipeError:
            raise
        except (OSError, ValueError) as error:
            silence_stdout()
            reason = error.strerror if isinstance(error, OSError) else error
            self._lost = ReportError(f"the work is done, and its report could not be written to stdout ({reason})")
            raise self._lost from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def watched_stdout() -> Iterator[None]:
    """Let every write to stdout in this context that fails raise ReportError; see ``_WatchedStdout``."""
    real = sys.stdout
    sys.stdout = cast("TextIO", _WatchedStdout(real))
    try:
        yield
        if real is not None:
            sys.stdout.flush()
    finally:
        sys.stdout = real


@contextlib.contextmanager
def report_of_done_work() -> Iterator[None]:
    """Tell of work that is done: it stays done where its reader has gone, and the exit code says so.

    Raises:
        ReportError: nobody reads stdout.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError as error:
        silence_stdout()
        raise ReportError(
            f"the work is done, and its report could not be written to stdout ({error.strerror})"
        ) from None


@contextlib.contextmanager
def report_before_verdict(ok: bool) -> Iterator[None]:
    """Tell what a check found; where that is wrong, an error follows on stderr and counts more than a lost report.

    So it does more than a page or a picture that cannot be written, which is noted.
    """
    try:
        yield
    except (ReportError, BrokenPipeError):
        if ok:
            raise
    except (InputOutputError, OutputExistsError, SpaceError) as error:
        if ok:
            raise
        say(f"note: {error}")


def unimportant(update: Callable[[T, int], None], lost: list[str]) -> Callable[[T, int], None]:
    """Return a progress function that never ends the work: what it cannot show is dropped, once noted in ``lost``."""

    def shown(done: T, total: int) -> None:
        if lost:
            return
        try:
            update(done, total)
        except (OSError, ValueError) as error:
            lost.append(f"progress could not be shown ({getattr(error, 'strerror', None) or error})")

    return shown


@contextlib.contextmanager
def errors_of_the_system() -> Iterator[None]:
    """Turn what the system and Python refuse of a user's input into one of our errors, wherever it comes up.

    Raises:
        InputMissingError, InputOutputError, SpaceError, FileFormatError, UsageError: by what was refused.
    """
    try:
        yield
    except (BrokenPipeError, Dsv4Error):
        raise
    except OSError as error:
        raise _of_system(error) from error
    except UnicodeError as error:
        raise FileFormatError(
            f"a name or a text is not UTF-8 ({escape_control(str(error))})", hint="rename the file or mend the text"
        ) from error
    except ValueError as error:
        if "embedded null" not in str(error):
            raise
        raise UsageError("a path holds a NUL", hint="check the arguments") from error
    except OverflowError as error:
        raise UsageError(f"a number is out of range ({error})", hint="check options and config.json") from error
    except RecursionError as error:
        raise FileFormatError("a file is nested too deeply", hint="is it what its name says?") from error


def _of_system(error: OSError) -> Dsv4Error:
    where = error.filename if isinstance(error.filename, (str, bytes)) else None
    if isinstance(where, bytes):
        where = os.fsdecode(where)
    what = error.strerror or str(error) or type(error).__name__
    what = what[:1].lower() + what[1:]
    if isinstance(error, FileNotFoundError):
        hint = None if where else "does the current folder still exist?"
        return InputMissingError(what, where=where, hint=hint)
    if isinstance(error, PermissionError):
        return InputOutputError(what, where=where, hint="check the permissions of the file and of its folders")
    if error.errno in _FULL:
        return SpaceError(what, where=where, hint="free some space and run again")
    if error.errno in _TOO_MANY_FILES:
        return InputOutputError(what, where=where, hint="raise the limit with ulimit -n")
    return InputOutputError(what, where=where)
