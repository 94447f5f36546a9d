"""Importance matrices: for each tensor the mean squares of the activations that meet its columns.

Two forms, both of llama.cpp's ``imatrix`` tool. The legacy ``.dat``, little-endian: int32 number of entries; for each
int32 name length, name, int32 calls, int32 number of values, float32 values (sums over calls of mean squares); then,
optionally, int32 chunks, int32 name length, name of the data set. The GGUF form: ``general.type`` "imatrix", tensors
``NAME.in_sum2`` [experts, columns] (sums of squares) and ``NAME.counts`` [experts, 1] (rows summed), both F32.

A stacked tensor has one vector an expert. Values stay in the file until a tile wants them: those of V4-Flash take
450 MB.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import FileFormatError, InputMissingError, not_read
from ..formats.ggml_types import BY_NAME
from ..plan import align_up
from .gguf import DEFAULT_ALIGNMENT, MAGIC, read_gguf_part
from .gguf_write import ARRAY, STRING, U32, KeyValue, TensorInfo, gguf_header
from .untrusted import file_size, open_regular

TYPE_KEY, IMATRIX_TYPE = "general.type", "imatrix"
# Where the magic and the version end that a GGUF begins with, and the numbers of tensors and keys after them.
VERSION_END, COUNTS_END = 8, 24
DATASETS_KEY, CHUNKS_KEY, CHUNK_SIZE_KEY = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
SUMS, COUNTS = ".in_sum2", ".counts"

# Limits of this reader. V4-Pro has 1,500 matrices; ggml's names have at most 63 bytes.
MAX_ENTRIES = 2**16
MAX_NAME_BYTES = 2**12
MAX_COUNT = 2**53  # exact in a float64
MAX_OVERRIDE_BYTES = 127
F32_BYTES = 4
CHECK_VALUES = 2**18  # values looked at together


class Entry(NamedTuple):
    """The sums of one tensor: float32 [len(counts), columns] at ``offset`` of ``file``.

    The weights of a matrix are its sums divided by its count; ``importance`` says what a count of 0 means. The only
    count of a legacy entry serves all its experts, whose number it does not tell.
    """

    file: Path
    offset: int
    columns: int
    counts: tuple[int, ...]
    is_legacy: bool

    @property
    def values(self) -> int:
        """Return the number of values."""
        return self.columns * len(self.counts)


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix: where each tensor's values lie, and what it was computed on.

    ``with_zeros`` are the entries in which a value is 0.
    """

    path: Path
    entries: Mapping[str, Entry] = field(repr=False)
    datasets: tuple[str, ...]
    chunks: int
    with_zeros: frozenset[str] = frozenset()

    def key_values(self) -> list[KeyValue]:
        """Return the metadata that a model made with this matrix states, as llama.cpp's ``quantize`` does."""
        keys = [KeyValue("quantize.imatrix.file", STRING, _clipped(str(self.path)))]
        if self.datasets:
            keys.append(KeyValue("quantize.imatrix.dataset", STRING, _clipped(self.datasets[0])))
        keys.append(KeyValue("quantize.imatrix.entries_count", U32, len(self.entries)))
        if self.chunks > 0:
            keys.append(KeyValue("quantize.imatrix.chunks_count", U32, self.chunks))
        return keys


def read_imatrix(path: Path) -> Imatrix:
    """Read names, counts and places of an importance matrix in either form, and look at each value once.

    Raises:
        InputMissingError, InputOutputError: no such file, or it cannot be read.
        FileFormatError: malformed, or a value that is no finite number of at least 0.
    """
    try:
        with open_regular(path) as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
            file.seek(0)
            imatrix = _read_gguf(path, file) if is_gguf else _Legacy(path, file).read()
            if not imatrix.entries:
                raise FileFormatError("no entries", where=path, expected="sums of squares of at least one tensor")
            zeros = frozenset(name for name, entry in imatrix.entries.items() if _check_values(name, entry, file))
    except FileNotFoundError:
        raise InputMissingError("no such importance matrix", where=path) from None
    except OSError as error:
        raise not_read(path, error) from None
    return replace(imatrix, with_zeros=zeros)


def importance(sums: NDArray[np.float32], count: int, is_legacy: bool) -> NDArray[np.float32]:
    """Return the weights of the columns of one matrix: ``sums`` / ``count``, as llama.cpp divides.

    ``sums`` is float32 [columns]; the division is one of float32 by float32. Weights of 0 alone would let a quantiser
    make zeros of the whole matrix: its columns count alike, as where nothing was counted.
    """
    weights: NDArray[np.float32] = sums / np.float32(count) if count > 0 else sums
    return weights if weights.any() and (count > 0 or is_legacy) else np.ones_like(sums)


def without_importance(entry: Entry, matrices: int) -> list[int]:
    """Return which of the matrices of an entry have a count and no importance, by number.

    Raises:
        InputMissingError, InputOutputError: the file cannot be read.
    """
    columns = entry.values // matrices
    found: list[int] = []
    try:
        with open_regular(entry.file) as file:
            file.seek(entry.offset)
            for number in range(matrices):
                sums = np.frombuffer(file.read(columns * F32_BYTES), "<f4")
                count = entry.counts[number] if len(entry.counts) > 1 else entry.counts[0]
                is_counted = count > 0 or entry.is_legacy
                if is_counted and not (sums / np.float32(max(1, count))).any():
                    found.append(number)
    except OSError as error:
        raise not_read(entry.file, error) from None
    return found


def _clipped(text: str) -> str:
    """Return a text of at most as many UTF-8 bytes as llama.cpp keeps of an override."""
    return text.encode("utf-8", "replace")[:MAX_OVERRIDE_BYTES].decode("utf-8", "ignore")


def _check_values(name: str, entry: Entry, file: BinaryIO) -> bool:
    """Check that all values of an entry are sums of squares, and return whether one is 0."""
    file.seek(entry.offset)
    has_zero = False
    for first in range(0, entry.values, CHECK_VALUES):
        wanted = min(CHECK_VALUES, entry.values - first)
        values = np.frombuffer(file.read(wanted * F32_BYTES), "<f4")
        if values.size < wanted:
            raise FileFormatError(f"entry {name!r}: the file shrank while being read", where=entry.file)
        wrong = ~((values >= 0) & (values < np.inf))
        if wrong.any():
            at = int(np.argmax(wrong))
            raise FileFormatError(
                f"entry {name!r}: value {first + at} is not a sum of squares",
                where=entry.file,
                expected="a finite number of at least 0",
                got=float(values[at]),
            )
        has_zero = has_zero or not values.all()
    return has_zero


def _read_gguf(path: Path, file: BinaryIO) -> Imatrix:
    part = read_gguf_part(path)
    kind = part.metadata.get(TYPE_KEY)
    if kind != IMATRIX_TYPE:
        raise FileFormatError(f"key {TYPE_KEY}: not an importance matrix", where=path, expected="imatrix", got=kind)
    datasets, chunks = part.metadata.get(DATASETS_KEY), part.metadata.get(CHUNKS_KEY)
    for key, known in ((DATASETS_KEY, "[str]"), (CHUNKS_KEY, "u32"), (CHUNK_SIZE_KEY, "u32")):
        if part.types.get(key) != known:
            raise FileFormatError(
                f"key {key} is missing or of another type",
                where=path,
                expected=known,
                got=part.types.get(key, "nothing"),
            )
    entries: dict[str, Entry] = {}
    counted: set[str] = set()
    for name, sums in part.tensors.items():
        if name.endswith(COUNTS):
            counted.add(name.removesuffix(COUNTS))
            continue
        if not name.endswith(SUMS):
            raise FileFormatError(f"tensor {name!r}: unknown", where=path, expected=f"names in {SUMS} or {COUNTS}")
        stem = name.removesuffix(SUMS)
        counts = part.tensors.get(stem + COUNTS)
        if counts is None:
            raise FileFormatError(f"tensor {stem + COUNTS!r} is missing", where=path)
        if sums.type != "f32" or counts.type != "f32":
            raise FileFormatError(f"entry {stem!r}: of another type", where=path, expected="f32")
        n_sums, n_counts = sums.nbytes // F32_BYTES, counts.nbytes // F32_BYTES
        if n_sums % n_counts or sums.shape[-1] != n_sums // n_counts:
            raise FileFormatError(
                f"entry {stem!r}: sums and counts do not belong together",
                where=path,
                expected=f"{n_counts} rows of sums",
                got=list(sums.shape),
            )
        file.seek(counts.offset)
        numbers = np.frombuffer(file.read(counts.nbytes), "<f4")
        if numbers.size < n_counts or not ((numbers >= 0) & (numbers < MAX_COUNT)).all():
            raise FileFormatError(f"tensor {stem + COUNTS!r}: not counts", where=path, expected=f"0 to {MAX_COUNT}")
        # Halves are rounded away from zero, as lround does.
        rounded = tuple(int(number) for number in np.floor(numbers.astype(np.float64) + 0.5))
        entries[stem] = Entry(path, sums.offset, n_sums // n_counts, rounded, is_legacy=False)
    for stem in counted - entries.keys():
        raise FileFormatError(f"tensor {stem + SUMS!r} is missing", where=path)
    return Imatrix(path, entries, tuple(datasets or ()), int(chunks or 0))


class _Legacy:
    """The legacy form, read front to back; lengths are compared with what is left of the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.left = file_size(file)

    def read(self) -> Imatrix:
        n_entries = self.number("the number of entries")
        if not 0 < n_entries <= MAX_ENTRIES:
            raise self.error("the number of entries", f"1 to {MAX_ENTRIES} of an importance matrix", n_entries)
        entries: dict[str, Entry] = {}
        for number in range(n_entries):
            what = f"entry {number}"
            name = self.text(what)
            if name in entries:
                raise self.error(f"duplicate entry {name!r}", None, None)
            calls, n_values = self.number(what), self.number(what)
            if calls < 0 or n_values < 1:
                raise self.error(f"{what}: calls and values", "0 or more, 1 or more", f"{calls} and {n_values}")
            entries[name] = Entry(self.path, self.file.tell(), n_values, (calls,), is_legacy=True)
            self.skip(n_values * F32_BYTES, what)
        chunks = 0
        datasets: tuple[str, ...] = ()
        if self.left:
            chunks = max(0, self.number("the number of chunks"))
            if self.left:
                name = self.text("the name of the data set")
                datasets = (name,) if name else ()
        return Imatrix(self.path, entries, datasets, chunks)

    def error(self, what: str, expected: object, got: object) -> FileFormatError:
        return FileFormatError(what, where=self.path, expected=expected, got=got)

    def skip(self, nbytes: int, what: str) -> None:
        if not 0 <= nbytes <= self.left:
            raise self.error(f"{what} extends past the end of the file", f"at most {self.left} bytes", nbytes)
        self.left -= nbytes
        self.file.seek(nbytes, os.SEEK_CUR)

    def take(self, nbytes: int, what: str) -> bytes:
        at = self.file.tell()
        self.skip(nbytes, what)
        self.file.seek(at)
        data = self.file.read(nbytes)
        if len(data) < nbytes:
            raise self.error(f"{what}: the file shrank while being read", None, None)
        return data

    def number(self, what: str) -> int:
        value: int = struct.unpack("<i", self.take(F32_BYTES, what))[0]
        return value

    def text(self, what: str) -> str:
        length = self.number(what)
        if not 0 <= length <= MAX_NAME_BYTES:
            raise self.error(f"{what}: length of the name", f"0 to {MAX_NAME_BYTES}", length)
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what}: the name is not UTF-8", None, None) from None


class ImatrixFile(NamedTuple):
    """Where everything of an importance matrix in the GGUF form lies, before any of its values is known.

    ``places`` are the offsets of each entry's sums [experts, columns] and counts [experts], both F32.
    """

    header: bytes
    places: Mapping[str, tuple[int, int]]
    nbytes: int


def begins_imatrix(head: bytes) -> bool:
    """Return whether the first bytes of a file are those of an importance matrix as ``imatrix_file`` lays it out."""
    expected = gguf_header([KeyValue(TYPE_KEY, STRING, IMATRIX_TYPE)], []).rstrip(b"\0")
    return head[:VERSION_END] == expected[:VERSION_END] and head[COUNTS_END : len(expected)] == expected[COUNTS_END:]


def imatrix_file(
    shapes: Mapping[str, tuple[int, int]], *, datasets: Iterable[str], chunks: int, chunk_size: int
) -> ImatrixFile:
    """Return the layout of an importance matrix with entries of ``shapes`` (experts, columns).

    Entries stand in order of their names, as llama.cpp writes them.
    """
    infos: list[TensorInfo] = []
    position = 0
    for name in sorted(shapes):
        experts, columns = shapes[name]
        for suffix, width in ((SUMS, columns), (COUNTS, 1)):
            infos.append(TensorInfo(name + suffix, (experts, width), BY_NAME["f32"].number, position))
            position = align_up(position + experts * width * F32_BYTES, DEFAULT_ALIGNMENT)
    keys = [
        KeyValue(TYPE_KEY, STRING, IMATRIX_TYPE),
        KeyValue(DATASETS_KEY, ARRAY, list(datasets), STRING),
        KeyValue(CHUNKS_KEY, U32, chunks),
        KeyValue(CHUNK_SIZE_KEY, U32, chunk_size),
    ]
    header = gguf_header(keys, infos)
    offsets = {info.name: len(header) + info.offset for info in infos}
    places = {name: (offsets[name + SUMS], offsets[name + COUNTS]) for name in shapes}
    return ImatrixFile(header, places, len(header) + position)
