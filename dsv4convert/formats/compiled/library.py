"""The shared library made from ``codecs.c``: which file suits this processor, and calls into it.

The build hook (``hatch_build.py``) compiles the same C once for each level of x86-64 and once for AArch64; the
best file that the processor can run is loaded. The files need no other library, not even libc, and no headers of
Python: one serves every version of both. ctypes lets other threads run during a call.
"""

from __future__ import annotations

import ctypes
import platform
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dsv4convert.formats.base import Array

FOLDER = Path(__file__).parent

# The flags of /proc/cpuinfo that each level of x86-64 adds to the one before, from the x86-64 psABI. The kernel
# leaves out what it does not support itself, such as the registers of AVX.
_X86_64_FLAGS = {
    "x86_64_v2": "cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3",
    "x86_64_v3": "abm avx avx2 bmi1 bmi2 f16c fma movbe xsave",
    "x86_64_v4": "avx512f avx512bw avx512cd avx512dq avx512vl",
}
_CPUINFO = Path("/proc/cpuinfo")
_CPUINFO_BYTES = 1 << 14  # the first processor's part

# What a parameter of a function may be: an array of one of numpy's types, or a 64-bit integer.
INTEGER = "n"

DIGEST_CHARACTERS = 8


class Function:
    """A function of arrays and integers that returns an integer.

    ``parameters`` gives each its type: numpy's short name for the elements of an array, or ``INTEGER``.
    """

    def __init__(self, library: ctypes.CDLL, name: str, parameters: str) -> None:
        self.name = name
        self._parameters = [None if kind == INTEGER else np.dtype(kind) for kind in parameters.split()]
        self._call: Callable[..., int] = getattr(library, name)
        self._call.restype = ctypes.c_int64
        self._call.argtypes = [ctypes.c_int64 if dtype is None else ctypes.c_void_p for dtype in self._parameters]

    def __call__(self, *arguments: Any) -> int:
        """Run the function.

        Raises ValueError for an array of another type or with gaps: the caller is wrong, not the user's file.
        """
        return self._call(
            *[
                argument if dtype is None else self._address(argument, dtype)
                for argument, dtype in zip(arguments, self._parameters, strict=True)
            ]
        )

    def _address(self, array: Array, dtype: np.dtype[Any]) -> int:
        if array.dtype != dtype or not array.flags.c_contiguous:
            raise ValueError(f"{self.name}: expected a contiguous array of {dtype}, got {array.dtype}")
        address: int = array.__array_interface__["data"][0]
        return address


def processor_levels() -> list[str]:
    """Return the levels that this processor can run, best first; empty where the library is built for none."""
    machine = platform.machine()
    if platform.system() != "Linux":
        return []
    if machine == "aarch64":
        return [machine]
    levels: list[str] = []
    if machine in ("x86_64", "AMD64"):
        flags = _processor_flags()
        for level, added in _X86_64_FLAGS.items():
            if not flags.issuperset(added.split()):
                break
            levels.insert(0, level)
    return levels


def _processor_flags() -> set[str]:
    try:
        with _CPUINFO.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_CPUINFO_BYTES)
    except OSError:
        return set()
    return next((set(line.split()) for line in text.splitlines() if line.startswith("flags")), set())


@cache
def library_path() -> Path | None:
    """Return the library's file for this processor, or None if none is built."""
    paths = (FOLDER / f"codecs-{level}.so" for level in processor_levels())
    return next((path for path in paths if path.is_file()), None)


@cache
def load_library() -> ctypes.CDLL:
    """Return the library, loaded at the first call.

    Raises:
        OSError: none is built for this processor, its file is damaged, or its sources have changed since.
    """
    path = library_path()
    if path is None:
        raise OSError("no compiled codecs for this processor")
    library = ctypes.CDLL(str(path))
    # A checkout that was updated keeps the library that it had, whose structures may be other ones.
    if any(FOLDER.glob("*.c")) and source_digest(FOLDER) != _digest_in(library):
        raise OSError(f"{path.name} was built from other sources: install the package again")
    return library


def source_digest(folder: Path) -> str:
    """Return the CRC-32 of all C sources in a folder, in the order of their names.

    It tells an old library from a new one, not a forged one; importing ``hashlib`` takes ten times as long.
    """
    return f"{zlib.crc32(b''.join(path.read_bytes() for path in sorted(folder.glob('*.c')))):08x}"


def _digest_in(library: ctypes.CDLL) -> str:
    try:
        return (ctypes.c_char * DIGEST_CHARACTERS).in_dll(library, "source_digest").value.decode("ascii", "replace")
    except ValueError:
        return ""
