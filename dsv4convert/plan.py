"""The plan: every output file with every byte range of it, and where its bytes come from.

A layout makes it from headers alone; the engine carries it out without knowing a tensor's name or a
file's format. Everything that can fail on the input has failed before a plan exists.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, overload

# Verbatim ranges are cut into segments of this many bytes, so that threads can share a large tensor.
COPY_SEGMENT_BYTES = 64 * 2**20

# Codecs of the engine that only move bytes: a run of bytes; rows as they are; two codecs' rows side by side.
COPY = "copy"
IDENTITY = "identity"
BESIDE = "beside"

# The args of a copy that stands in several files of the output, so that its checksum need be taken only once.
REPEATED = ("repeated",)


class Operand(NamedTuple):
    """A row-major matrix in a source file: one input of a codec.

    ``row_bytes`` bytes a row, each of numpy dtype ``dtype``; one row of it serves ``rows_per`` rows of
    the output (1 for weights, the block's height for scales).
    """

    file: Path
    offset: int
    row_bytes: int
    rows_per: int
    dtype: str


class Segment(NamedTuple):
    """A contiguous run of output rows that one codec makes: the unit of work, of checksums and of resume.

    ``codec`` names an entry of the engine's codec table, ``args`` are its parameters (a scale block, a
    column range). A ``copy`` segment has one operand, rows of one byte, and ``REPEATED`` or no args.
    """

    codec: str
    operands: tuple[Operand, ...]
    rows: int
    row_bytes: int
    args: tuple[Any, ...] = ()

    @property
    def nbytes(self) -> int:
        """Return how many output bytes the segment makes."""
        return self.rows * self.row_bytes


class OutputTensor(NamedTuple):
    """A tensor of an output file: ``nbytes`` at ``offset`` from the file's start, made by ``segments`` in order.

    All segments have the same size save the last, which may be shorter.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    segments: Sequence[Segment]


@dataclass(frozen=True)
class OutputFile:
    """A file of the output: ``header`` at its start, tensors behind it, zeros between them."""

    name: str
    header: bytes = field(repr=False)
    tensors: tuple[OutputTensor, ...] = field(repr=False)
    nbytes: int


@dataclass(frozen=True)
class Dropped:
    """Source tensors that the output leaves out on purpose."""

    what: str
    reason: str
    count: int
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """All that a conversion will do.

    ``is_folder``: the files make one folder ``destination``, which appears whole; otherwise each file
    appears in the folder ``destination``. ``options`` are the choices that decide the output's bytes.
    """

    target: str
    source: Path
    destination: Path
    is_folder: bool
    files: tuple[OutputFile, ...]
    dropped: tuple[Dropped, ...]
    options: Mapping[str, Any]
    source_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Return the bytes of all output files."""
        return sum(file.nbytes for file in self.files)

    @property
    def n_tensors(self) -> int:
        """Return the number of output tensors."""
        return sum(len(file.tensors) for file in self.files)

    def output_path(self) -> Path:
        """Return the path that stands for the whole output: the folder, or the first file."""
        return self.destination if self.is_folder else self.destination / self.files[0].name

    def final_paths(self) -> list[Path]:
        """Return the paths of the finished output files."""
        return [self.destination / file.name for file in self.files]


class MadeSegments(Sequence[Segment], ABC):
    """Segments that are made when they are asked for, all of ``nbytes`` together.

    A large model has a hundred thousand tensors, and a segment takes several times the room of what it is
    made from.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Return how many output bytes the segments make."""

    @abstractmethod
    def _make(self, number: int) -> Segment:
        """Return the segment with this number, from 0."""

    @overload
    def __getitem__(self, index: int) -> Segment: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Segment]: ...
    def __getitem__(self, index: int | slice) -> Segment | Sequence[Segment]:
        numbers = range(len(self))[index]
        return tuple(map(self._make, numbers)) if isinstance(numbers, range) else self._make(numbers)

    def __iter__(self) -> Iterator[Segment]:
        return map(self._make, range(len(self)))


class CopySegments(MadeSegments):
    """The segments that copy ``nbytes`` bytes at ``offset`` of ``file`` as they are.

    ``is_repeated``: the same segments stand in several files of the output.
    """

    __slots__ = ("_nbytes", "file", "is_repeated", "offset")

    def __init__(self, file: Path, offset: int, nbytes: int, is_repeated: bool = False) -> None:
        self.file = file
        self.is_repeated = is_repeated
        self.offset = offset
        self._nbytes = nbytes

    @property
    def nbytes(self) -> int:
        """Return how many bytes are copied."""
        return self._nbytes

    def __len__(self) -> int:
        return -(-self._nbytes // COPY_SEGMENT_BYTES)

    def _make(self, number: int) -> Segment:
        begin = number * COPY_SEGMENT_BYTES
        operand = Operand(self.file, self.offset + begin, 1, 1, "u1")
        args = REPEATED if self.is_repeated else ()
        return Segment(COPY, (operand,), min(COPY_SEGMENT_BYTES, self._nbytes - begin), 1, args)


def total_bytes(segments: Sequence[Segment]) -> int:
    """Return how many output bytes segments make together."""
    if isinstance(segments, MadeSegments):
        return segments.nbytes  # of copies one object for all tensors of the size, where a sum makes another
    return sum(segment.nbytes for segment in segments)


def align_up(value: int, alignment: int) -> int:
    """Return the smallest multiple of ``alignment`` that is at least ``value``."""
    return -(-value // alignment) * alignment


def place(specs: Sequence[OutputTensor], start: int, alignment: int) -> Iterator[OutputTensor]:
    """Yield the tensors with offsets from ``start`` on, each aligned to ``alignment`` bytes."""
    position = start
    for tensor in specs:
        position = align_up(position, alignment)
        yield tensor._replace(offset=position)
        position += tensor.nbytes
