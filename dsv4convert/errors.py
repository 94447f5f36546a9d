"""Every error that a user can meet: one tree, one line each, one exit code per kind."""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar


def escape_control(text: str) -> str:
    """Return ``text`` with every control character shown as an escape, so that it stays on one line.

    Names come from untrusted files: a newline would forge a second line of output, and an escape sequence would
    control the terminal.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def counted(count: int, what: str = "tensor", plural: str | None = None) -> str:
    """Return a count with its noun.

    >>> counted(1), counted(1234, "file"), counted(2, "entry", "entries")
    ('1 tensor', '1,234 files', '2 entries')
    """
    return f"{count:,} {what if count == 1 else plural or what + 's'}"


def some(names: Sequence[str], most: int) -> str:
    """Return names in a line, and that there are more than ``most`` of them.

    >>> some(["a", "b", "c"], 2)
    'a, b, …'
    """
    return ", ".join([*names[:most], *(["…"] if names[most:] else [])])


def first_of(names: Sequence[str], most: int = 1) -> str:
    """Return the first names in a line, and how many more there are.

    >>> first_of(["a", "b", "c"], 2), first_of(["a"]), first_of(["a"] * 1001)
    ('a, b and 1 more', 'a', 'a and 1,000 more')
    """
    more = f" and {len(names) - most:,} more" if names[most:] else ""
    return ", ".join(names[:most]) + more


def and_more(found: Collection[object], what: str | None = None) -> str:
    """Return how many there are besides the first one, which a message is about; nothing where it is alone.

    >>> and_more("abc"), and_more("ab", "tensor"), and_more("a"), and_more("a" * 1001)
    (' (and 2 more)', ' (and 1 more tensor)', '', ' (and 1,000 more)')
    """
    others = len(found) - 1
    more = f"{others:,} more" if what is None else counted(others, f"more {what}")
    return f" (and {more})" if others > 0 else ""


# Local folders that stand for remote ones (see ``containers.sources``), and the addresses to show instead.
SHOWN_PATHS: dict[str, str] = {}


def shown_path(text: str) -> str:
    """Return a path as users know it: inside a folder that stands for a remote one, with the address instead."""
    for path, address in SHOWN_PATHS.items():
        if text == path or text.startswith(path + "/"):
            return address + text[len(path) :]
    return text


# Limits of the parts of a message: values come from untrusted files.
MAX_CHARACTERS = 400
MAX_PATH_CHARACTERS = 4096


def _clip(value: object, most: int = MAX_CHARACTERS) -> str:
    text = str(value)
    return text if len(text) <= most else text[: most - 1] + "…"


class Dsv4Error(Exception):
    """Base of all errors of dsv4convert.

    ``what`` says what is wrong, ``where`` the file, tensor or key; ``expected``/``got`` are the two
    sides of a comparison, and ``hint`` is the next step for the user. ``str()`` joins them in one line.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.expected = expected
        self.got = got
        self.hint = hint
        super().__init__(self._one_line())

    def with_changes(self, *, what: str | None = None, hint: str | None = None) -> Dsv4Error:
        """Return the same error with other words for what is wrong, or another next step."""
        return type(self)(
            self.what if what is None else what,
            where=self.where,
            expected=self.expected,
            got=self.got,
            hint=self.hint if hint is None else hint,
        )

    def _one_line(self) -> str:
        what = _clip(self.what)
        line = what if self.where is None else f"{_clip(shown_path(str(self.where)), MAX_PATH_CHARACTERS)}: {what}"
        if self.expected is not None:
            line += f": expected {_clip(self.expected)}"
            if self.got is not None:
                line += f", got {_clip(self.got)}"
        elif self.got is not None:
            line += f": got {_clip(self.got)}"
        if self.hint is not None:
            line += f"; {self.hint}"
        return escape_control(line)


class UsageError(Dsv4Error):
    """A wrong option or argument."""

    exit_code = 2


def check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    """Check that the value of an option is one of those that it may have.

    Raises:
        UsageError: it is not.
    """
    if value not in choices:
        raise UsageError(f"{option}: unknown", expected=either(choices), got=value)


def either(choices: Iterable[str]) -> str:
    """Return choices as one reads them.

    >>> either(["keep", "drop", "only"])
    'keep, drop or only'
    """
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last


class InputMissingError(Dsv4Error):
    """A missing file or folder, or something else under its name."""

    exit_code = 3


class ConfigError(Dsv4Error):
    """A missing, malformed or inconsistent ``config.json``; the message names the key."""

    exit_code = 4


class UnsupportedError(Dsv4Error):
    """A recognised but unsupported model or format."""

    exit_code = 5


class FileFormatError(Dsv4Error):
    """A malformed safetensors, GGUF, index, journal or manifest file."""

    exit_code = 6


class InventoryError(Dsv4Error):
    """Missing, unknown or duplicate tensors, or tensors of the wrong shape or dtype."""

    exit_code = 7


class TokenizerError(Dsv4Error):
    """A missing or unknown tokenizer, or one that does not fit the vocabulary."""

    exit_code = 8


class OutputExistsError(Dsv4Error):
    """An output that already exists, without ``--overwrite``, or cannot be created (e.g. its folder is missing)."""

    exit_code = 9


class SpaceError(Dsv4Error):
    """Not enough disk space or memory."""

    exit_code = 10


class LossyError(Dsv4Error):
    """An inexact conversion under ``--strict``."""

    exit_code = 11


class VerifyError(Dsv4Error):
    """An output that differs from its source."""

    exit_code = 12


class ResumeError(Dsv4Error):
    """An interrupted conversion that cannot be resumed."""

    exit_code = 13


class LockedError(Dsv4Error):
    """An output that another run is writing."""

    exit_code = 14


class DeviceError(Dsv4Error):
    """A missing accelerator or optional package."""

    exit_code = 15


class InputOutputError(Dsv4Error):
    """A read or write that the system refused, or that failed in the middle of a run."""

    exit_code = 16


# What the system answers where nothing, or no regular file, stands under the name of a file.
_NO_FILE = frozenset(
    {
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
        *(errno.EINVAL, errno.ENXIO, errno.ENODEV),
    }
)


CHECK_NAME = "check the name"


def not_read(path: object, error: OSError, hint: str = "is the download complete?") -> Dsv4Error:
    """Return the error of a file that could not be read: there is none under the name, or the system refused.

    ``hint`` is what to do where there is none.
    """
    if isinstance(error, FileNotFoundError):
        return InputMissingError("no such file", where=path, hint=hint)
    kind = InputMissingError if error.errno in _NO_FILE else InputOutputError
    return kind(f"cannot be read ({error.strerror})", where=path)


@contextmanager
def named_by_user() -> Iterator[None]:
    """Hint at the name of a file that is not there: an option names it, and no download brings it.

    Raises:
        InputMissingError: it is not there.
    """
    try:
        yield
    except InputMissingError as error:
        raise error.with_changes(hint=CHECK_NAME) from None


def install_hint(extra: str, otherwise: str | None = None) -> str:
    """Return how to install what an extra brings, and what can be done without it."""
    return f"run pip install 'dsv4convert[{extra}]'" + (f", or {otherwise}" if otherwise else "")


def missing_package(
    what: str, package: str, extra: str, otherwise: str | None = None, *, where: object = None
) -> DeviceError:
    """Return the error that ``what`` needs a package that an extra brings and that is not installed."""
    return DeviceError(
        f"{what} needs the package {package}, which is missing", where=where, hint=install_hint(extra, otherwise)
    )


# Characters of a note on a file that is not used.
MAX_NOTE = 200


@contextmanager
def noted(name: str, notes: list[str]) -> Iterator[None]:
    """Note what is wrong with a file that nothing depends on, and go on without it.

    Raises:
        InputOutputError: the system refused to read it.
    """
    try:
        yield
    except InputOutputError:
        raise
    except Dsv4Error as error:
        notes.append(f"{name}: not used: {' '.join(error.what.split())[:MAX_NOTE]}")


class ReportError(Dsv4Error):
    """The work is done, but its report could not be written: stdout is closed or full, or its reader is gone."""

    exit_code = 17


class RunInterruptedError(Dsv4Error):
    """The user stopped the run; the finished work is kept."""

    exit_code = 130
