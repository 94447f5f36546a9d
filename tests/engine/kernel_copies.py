"""Takes the help with segments away, that of the compiled library and that of the kernel with copies.

For tests that must see every byte, or that test the way without it.
"""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from dsv4convert.engine.compiled_segments import CompiledSegments

KERNEL_COPIES = ("copy_file_range", "splice")


def make_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the compiled library make no segment."""
    monkeypatch.setattr(CompiledSegments, "begin", lambda *_, **__: None)


def refuse_kernel_copies(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOSYS) -> None:
    """Have the system refuse to copy from file to file, with the given error, and the library to make segments."""
    make_in_python(monkeypatch)

    def refuse(*_: Any, **__: Any) -> int:
        raise OSError(number, os.strerror(number))

    for name in KERNEL_COPIES:
        monkeypatch.setattr(os, name, refuse)
