"""Writes a page as every small result is written: whole, under its name only once it is, and over nothing unasked."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..engine.conversion import check_result
from ..engine.names import Identity
from ..engine.outputs import write_file
from ..errors import UsageError

SUFFIXES = (".html", ".htm")


def check_report(
    path: Path, *, overwrite: bool, inputs: Iterable[Path] = (), outputs: Iterable[Path] = ()
) -> Identity | None:
    """Return what a page replaces, having checked, before anything else is done, that it can be written to ``path``.

    ``inputs`` are files that it must not replace, ``outputs`` files and folders of which it must be no part: a manifest
    lists all that is in them.

    Raises:
        UsageError: the name is not that of a page, or is taken by an input or an output.
        OutputExistsError: something is there and ``overwrite`` is false, or it can never be replaced.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError("--report: not the name of a page", expected="a name that ends in .html or .htm", got=path)
    written = Path(os.path.realpath(path.parent), path.name)
    for taken in outputs:
        if written.is_relative_to(os.path.realpath(taken)):
            raise UsageError("--report: the page would lie in the output", where=path, hint="choose another place")
    return check_result(path, inputs, overwrite=overwrite)


def write_report(text: str, path: Path, replaced: Identity | None) -> None:
    """Write a page, as text, to a ``path`` that has been checked, in place of ``replaced``.

    Raises:
        OutputExistsError: something came there meanwhile.
        SpaceError, InputOutputError: the system refused.
    """
    write_file(path, (text.encode("utf-8", "backslashreplace"),), replaced)
