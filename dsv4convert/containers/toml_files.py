"""TOML files of things that have names: those that come with one of our packages, and the user's own by their path."""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import FileFormatError, UsageError, named_by_user
from .untrusted import read_whole

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SUFFIX = ".toml"


def names_in(package: str) -> list[str]:
    """Return the names of the files that come with a package, sorted."""
    entries = resources.files(package).iterdir()
    return sorted(entry.name.removesuffix(SUFFIX) for entry in entries if entry.name.endswith(SUFFIX))


def read_named(option: str, name: str, package: str, most_bytes: int) -> tuple[str, bytes, object]:
    """Return (name, content, where it lies) of what an option names: one of ``names_in``, or a path that ends in .toml.

    Raises:
        UsageError: nothing of that name comes with the package.
        InputMissingError, FileFormatError: no such file, or one of more than ``most_bytes``.
    """
    if name.endswith(SUFFIX):
        path = Path(name)
        with named_by_user():
            return path.stem, read_whole(path, most_bytes), path
    known = names_in(package)
    if name not in known:
        raise UsageError(f"{option}: unknown", expected=f"{', '.join(known)} or a file that ends in {SUFFIX}", got=name)
    return name, (resources.files(package) / (name + SUFFIX)).read_bytes(), name


def parse_toml(content: bytes, where: object) -> dict[str, Any]:
    """Return the table of a TOML text.

    Raises:
        FileFormatError: it is none.
    """
    try:
        table: dict[str, Any] = tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # besides TOML and UTF-8 errors, integers of more than 4300 digits
        raise FileFormatError("not a TOML file", where=where, got=error) from None
    return table
