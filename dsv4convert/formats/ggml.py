"""Low-bit types through ggml's own quantisers: ``libggml-base``, found where llama.cpp is installed.

Source layout: F32 rows [rows, columns], contiguous. Result layout: blocks of ``ggml_types``, row by row. A row is
quantised by itself, so any run of rows gives the bytes that the whole matrix would give. With an importance vector
(float32 [columns]: mean squares of the activations that meet each column) errors in important columns weigh more.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from dsv4convert.errors import DeviceError, install_hint
from dsv4convert.formats.base import ArrayF32, ArrayU8
from dsv4convert.formats.ggml_types import BY_NAME, GgmlType

PACKAGE = "llama_cpp"  # the module of llama-cpp-python, which carries the library
LIBRARY_NAME = "libggml-base.so"
INSTALL_HINT = install_hint("lowbit", "pass --ggml-lib PATH")

_FLOATS, _BYTES = ctypes.POINTER(ctypes.c_float), ctypes.c_void_p
# Of ggml_quantize_chunk: the type's number, values, room for blocks, the first element, rows, columns, and a weight for
# each column or NULL. It returns the bytes that it made.
PARAMETERS: list[type[Any]] = [ctypes.c_int, _FLOATS, _BYTES, *[ctypes.c_int64] * 3, _FLOATS]
Chunk: TypeAlias = Callable[..., int]

SAMPLE_SHAPE = 64, 1024


class Quantiser:
    """ggml's quantisers in one loaded library. Threads may call it side by side: it keeps no state of a call."""

    def __init__(self, path: str) -> None:
        """Load the library at ``path`` (a file, or a name on the loader's path).

        Raises:
            DeviceError: it does not load, or lacks a function.
        """
        self.path = path
        try:
            library = ctypes.CDLL(path)
            chunk, prepare = library.ggml_quantize_chunk, library.ggml_quantize_init
            block, size, version = library.ggml_blck_size, library.ggml_type_size, library.ggml_version
        except (OSError, AttributeError, ValueError) as error:
            raise DeviceError(
                "ggml's library cannot be used", where=path, got=error, expected="libggml-base", hint=INSTALL_HINT
            ) from None
        chunk.restype = ctypes.c_size_t
        chunk.argtypes = PARAMETERS
        prepare.restype, prepare.argtypes = None, [ctypes.c_int]
        block.restype, block.argtypes = ctypes.c_int64, [ctypes.c_int]
        size.restype, size.argtypes = ctypes.c_size_t, [ctypes.c_int]
        version.restype, version.argtypes = ctypes.c_char_p, []
        self._chunk, self._prepare, self._block, self._size = chunk, prepare, block, size
        self.version: str = version().decode("ascii", "backslashreplace")
        self._prepared: set[str] = set()
        self._agreed: dict[tuple[int, str, bool], bool] = {}
        self._lock = threading.Lock()

    def check(self, name: str) -> None:
        """Check that the library has the type ``name``, in blocks of the known size.

        Raises:
            DeviceError: it has not: releases before the type was added do not know it.
        """
        kind = BY_NAME[name]
        got = self._block(kind.number), self._size(kind.number)
        if got != (kind.elements, kind.nbytes):
            raise DeviceError(
                f"ggml's library {self.version} does not have {name} as it is known here",
                where=self.path,
                expected=f"{kind.nbytes} bytes for {kind.elements} elements",
                got=f"{got[1]} for {got[0]}",
                hint="pass --ggml-lib with the library of another release of llama.cpp, or choose another type",
            )

    def address(self, name: str, twin: Chunk | None = None, *, weighted: bool = False) -> int:
        """Return where ``ggml_quantize_chunk`` lies, ready for the type ``name``, for a caller in C.

        Or where a ``twin`` of it lies that makes the same bytes of a sample, with weights of columns or without: what a
        type's bytes are is the library's to say, and another release may round otherwise. Each is compared once.

        Raises:
            DeviceError: the library does not have the type.
        """
        self._make_ready(name)
        own = _place(self._chunk)
        if twin is None:
            return own
        case = _place(twin), name, weighted
        if case not in self._agreed:
            self._agreed[case] = self._agrees_with(twin, BY_NAME[name], weighted)
        return case[0] if self._agreed[case] else own

    def _agrees_with(self, twin: Chunk, kind: GgmlType, weighted: bool) -> bool:
        values = sample()
        weights = np.abs(values[1]).ctypes.data_as(_FLOATS) if weighted else None
        theirs, ours = np.zeros((2, len(values), kind.row_bytes(values.shape[1])), np.uint8)
        for chunk, out in ((twin, ours), (self._chunk, theirs)):
            made = chunk(kind.number, values.ctypes.data_as(_FLOATS), out.ctypes.data, 0, *values.shape, weights)
            if made != out.nbytes:
                return False
        return np.array_equal(ours, theirs)

    def quantise(self, name: str, values: ArrayF32, out: ArrayU8, importance: ArrayF32 | None = None) -> None:
        """Fill ``out`` [rows, row bytes] with ``values`` [rows, columns] in type ``name``.

        ``importance``: one weight a column, all rows alike, or None.

        Raises:
            DeviceError: the library does not have the type.
            ValueError: arrays that do not belong together; the plan is wrong, not the user's file.
        """
        kind = BY_NAME[name]
        rows, columns = values.shape
        if columns % kind.elements or out.shape != (rows, kind.row_bytes(columns)):
            raise ValueError(f"{name}: {values.shape} values do not make {out.shape} bytes")
        if importance is not None and importance.shape != (columns,):
            raise ValueError(f"{name}: expected {columns} weights of importance, got {importance.shape}")
        for array in (values, out) if importance is None else (values, out, importance):
            if not array.flags.c_contiguous:
                raise ValueError(f"{name}: the arrays of a tile must be contiguous")
        self._make_ready(name)
        weights = None if importance is None else importance.ctypes.data_as(_FLOATS)
        made = self._chunk(kind.number, values.ctypes.data_as(_FLOATS), out.ctypes.data, 0, rows, columns, weights)
        if made != out.nbytes:
            raise ValueError(f"{name}: the library made {made} bytes, expected {out.nbytes}")

    def _make_ready(self, name: str) -> None:
        if name not in self._prepared:
            self.check(name)
            with self._lock:  # makes the grids of the IQ types, once
                self._prepare(BY_NAME[name].number)
                self._prepared.add(name)


def _place(chunk: Chunk) -> int:
    return ctypes.cast(chunk, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


def sample() -> ArrayF32:
    """Return values of ordinary rows: small integers, with ties and zeros, in every other one, else full mantissas."""
    rows, columns = SAMPLE_SHAPE
    scattered = np.arange(rows * columns, dtype=np.uint32) * np.uint32(2654435769)  # 2^32 over the golden ratio
    values = (scattered ^ scattered >> 15).view(np.int32).reshape(SAMPLE_SHAPE)
    values[::2] >>= 27
    exponents = np.where(np.arange(rows) % 2, -32, 0) - np.arange(rows) % 16
    result: ArrayF32 = np.ldexp(values.astype(np.float32), exponents[:, None].astype(np.int32))
    return result


def find_quantiser(path: Path | None = None) -> Quantiser:
    """Return ggml's quantisers from ``path``, from an installed llama-cpp-python, or from the loader's path.

    Raises:
        DeviceError: there is none.
    """
    if path is not None:
        library = path / LIBRARY_NAME if path.is_dir() else path
        if not library.is_file():  # a pipe would be waited for
            raise DeviceError("no such library", where=library, hint=INSTALL_HINT)
        return Quantiser(os.path.abspath(library))
    found = importlib.util.find_spec(PACKAGE)
    for folder in found.submodule_search_locations or () if found else ():
        installed = Path(folder) / "lib" / LIBRARY_NAME
        if installed.is_file():
            return Quantiser(str(installed))
    from ctypes.util import find_library

    named = find_library("ggml-base")
    if named is None:
        raise DeviceError("types below Q8_0 and MXFP4 need ggml's library, which is missing", hint=INSTALL_HINT)
    return Quantiser(named)
