"""Takes the kernel's help with copies away, for tests that must see every byte or that test the way without it."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

KERNEL_COPIES = ("copy_file_range", "splice")


def refuse_kernel_copies(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOSYS) -> None:
    """Have the system refuse to copy from file to file, with the given error."""

    def refuse(*_: Any, **__: Any) -> int:
        raise OSError(number, os.strerror(number))

    for name in KERNEL_COPIES:
        monkeypatch.setattr(os, name, refuse)
