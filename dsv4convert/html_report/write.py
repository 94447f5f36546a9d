"""Writes a page as every small output is written: whole, under its name only once it is, and over nothing unasked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from ..engine.outputs import FileOutputs
from ..errors import UsageError
from ..plan import OutputFile, Plan

SUFFIXES = (".html", ".htm")


def check_report(path: Path, *, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Check, before anything else is done, that a page can be written to ``path``.

    ``inputs`` are files that it must not replace.

    Raises:
        UsageError: the name is not that of a page, or is taken by an input.
        OutputExistsError: something is there and ``overwrite`` is false, or it can never be replaced.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError("--report: not the name of a page", expected="a name that ends in .html", got=path)
    for taken in inputs:
        if path.exists() and taken.is_file() and path.samefile(taken):
            raise UsageError("--report: the page would replace the input", where=path, hint="choose another name")
    with contextlib.closing(FileOutputs(_plan(path, b""))) as file:
        file.check_absent(overwrite)


def write_report(text: str, path: Path, *, overwrite: bool) -> None:
    """Write a page, as text, to a ``path`` that has been checked.

    Raises:
        OutputExistsError: something is there, or came there meanwhile, and ``overwrite`` is false.
        SpaceError, InputOutputError: the system refused.
    """
    with contextlib.closing(FileOutputs(_plan(path, text.encode("utf-8", "backslashreplace")))) as file:
        file.look()
        file.check_absent(overwrite)
        try:
            file.create()
            file.finish()
        except BaseException:
            file.discard()
            raise


def _plan(path: Path, content: bytes) -> Plan:
    return Plan(
        target="report",
        source=path.parent,
        destination=path.parent,
        is_folder=False,
        files=(OutputFile(path.name, content, (), len(content)),),
        dropped=(),
        options={},
        source_bytes=0,
    )
