"""The plan: every output file with every byte range of it, and where its bytes come from.

A layout makes it from headers alone; the engine carries it out without knowing a tensor's name or a
file's format. Everything that can fail on the input has failed before a plan exists.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args, overload

from .errors import InventoryError
from .scale_forms import ScaleForm

# Verbatim ranges are cut into segments of this many bytes, so that threads can share a large tensor.
COPY_SEGMENT_BYTES = 64 * 2**20

# What bytes of a checkpoint, and of an output, hold.
Source: TypeAlias = Literal["fp4", "nvfp4", "int4", "fp8", "bf16", "f16", "f32", "i64", "i32"]
Target: TypeAlias = Literal["f32", "f16", "bf16", "q8_0", "mxfp4", "nvfp4", "i32"]
# What ggml's library makes.
LowBit: TypeAlias = Literal[
    "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k",
    "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_nl", "iq4_xs",
    "tq1_0", "tq2_0", "nvfp4", "q1_0", "q2_0",
]  # fmt: skip
LOW_BIT: Mapping[str, LowBit] = {name: name for name in get_args(LowBit)}
Block: TypeAlias = tuple[int, int]  # (rows, columns) that share one scale

# What one row of an operand serves where it serves all rows of a segment: more than any has.
ALL_ROWS = 2**40

# Every conversion that there is a codec for.
CONVERSIONS: frozenset[tuple[Source, Target]] = frozenset(
    {
        ("fp4", "f32"), ("fp4", "bf16"), ("fp4", "f16"), ("fp4", "q8_0"), ("fp4", "mxfp4"),
        ("nvfp4", "f32"), ("nvfp4", "bf16"), ("nvfp4", "f16"), ("nvfp4", "q8_0"), ("nvfp4", "mxfp4"),
        ("nvfp4", "nvfp4"),
        ("int4", "f32"), ("int4", "bf16"), ("int4", "f16"), ("int4", "q8_0"), ("int4", "mxfp4"),
        ("fp8", "f32"), ("fp8", "bf16"), ("fp8", "f16"), ("fp8", "q8_0"), ("fp8", "mxfp4"),
        ("bf16", "f32"), ("bf16", "f16"), ("bf16", "q8_0"), ("bf16", "mxfp4"),
        ("f16", "f32"), ("f16", "bf16"), ("f16", "q8_0"), ("f16", "mxfp4"),
        ("f32", "bf16"), ("f32", "f16"), ("f32", "q8_0"), ("f32", "mxfp4"),
        ("i64", "i32"),
    }
)  # fmt: skip


# The operations: a closed set. One object of a kind serves all segments of the kind.


@dataclass(frozen=True, slots=True)
class Copy:
    """A run of bytes as it is: one operand, rows of one byte.

    ``is_repeated``: the same run stands in several files of the output, so that its checksum need be taken only once.
    ``holds`` is the safetensors dtype of its elements, where those that are not finite are to be counted.
    """

    is_repeated: bool = False
    holds: str = ""


@dataclass(frozen=True, slots=True)
class Keep:
    """Rows as they are; what a ``Copy`` is inside a ``Beside``, ``holds`` too."""

    holds: str = ""


@dataclass(frozen=True, slots=True)
class Convert:
    """Elements of another type: one operand, and its scales as a second where ``block`` says what shares one.

    A third are the words of zero points that INT4 may have, for eight rows each.
    """

    source: Source
    target: Target
    block: Block | None


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums of squares of activations, an operand of their own: weights of columns once divided by ``count``.

    A row of float32, one a column; ``is_legacy`` says what a count of 0 means (see ``containers.imatrix``).
    """

    count: int
    is_legacy: bool


@dataclass(frozen=True, slots=True)
class SquaredWeights:
    """Weights of columns without activations: the sum over all rows of the matrix of each element's square.

    Behind the operands of a segment's own rows stand the same ones of the whole matrix, each in one row.
    """


@dataclass(frozen=True, slots=True)
class Quantise:
    """Elements of a low-bit type, made by ggml's library at ``library``: operands of ``Convert``, then those of sums.

    ``importance`` None leaves all columns alike.
    """

    source: Source
    target: LowBit
    block: Block | None
    library: str
    importance: Sums | SquaredWeights | None = None


@dataclass(frozen=True, slots=True)
class Beside:
    """The rows of two operations next to each other; the first one's take ``left_bytes``, and half of the operands."""

    left: Keep | Convert
    right: Keep | Convert
    left_bytes: int


@dataclass(frozen=True, slots=True)
class Columns:
    """The bytes from ``first`` to ``last`` (exclusive) of each row of the one operand; ``holds`` as for ``Copy``."""

    first: int
    last: int
    holds: str = ""


@dataclass(frozen=True, slots=True)
class Join:
    """The rows of all operands, one next to the other; ``holds`` as for ``Copy``, of each operand, or of none."""

    holds: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AllEqual:
    """The rows of the first operand, which all others must hold as well; ``holds`` as for ``Copy``."""

    holds: str = ""


@dataclass(frozen=True, slots=True)
class Fill:
    """Bytes of one value, without an operand."""

    byte: int


@dataclass(frozen=True, slots=True)
class Constant:
    """The same bytes in each row, without an operand."""

    content: bytes


@dataclass(frozen=True, slots=True)
class Fp4ToFp8Codes:
    """The e4m3 codes of packed FP4: operands are the weight and, in one row for a tile's rows, its scales.

    ``side`` rows and columns make a tile, which shares a scale.
    """

    side: int


@dataclass(frozen=True, slots=True)
class Fp4ToFp8Scales:
    """The e8m0 scales of those codes; the operand's rows hold ``groups`` FP4 scales for each row of a tile."""

    groups: int
    side: int


@dataclass(frozen=True, slots=True)
class Fp4ToNvfp4Codes:
    """The codes of packed FP4 as NVFP4: operands are the weight, its scales, and all scales under one second scale.

    Of the latter there is an operand for each matrix that shares the second scale, the matrix in one row.
    """


@dataclass(frozen=True, slots=True)
class Fp4ToNvfp4Scales:
    """The e4m3 scales of those codes: operands are the scales, and all scales under one second scale."""


@dataclass(frozen=True, slots=True)
class Fp4ToNvfp4Second:
    """Their second scale, float32: operands are all scales under it, each matrix in one row."""


@dataclass(frozen=True, slots=True)
class Bf16ToFp8Codes:
    """The e4m3 codes that make BF16 values exactly; a row of the operand holds all rows of a ``block``."""

    block: Block


@dataclass(frozen=True, slots=True)
class Bf16ToFp8Scales:
    """The scales of those codes, as float32 or as e8m0, for a weight of ``columns`` columns."""

    columns: int
    as_f32: bool
    block: Block


@dataclass(frozen=True, slots=True)
class SpreadScales:
    """A scale for every row and every part of a row: those of blocks, each ``times`` (down, across), cut to the output.

    The operand holds E8M0 scales, or float32 ones that are powers of two; the output is E8M0.
    """

    times: Block


@dataclass(frozen=True, slots=True)
class ToFp8Codes:
    """The e4m3 codes of floats, rounded, as published; a row of the operand holds all rows of a ``block``."""

    source: Source
    block: Block


@dataclass(frozen=True, slots=True)
class ToFp8Scales:
    """The e8m0 scales of those codes, for a weight of ``columns`` columns."""

    source: Source
    columns: int
    block: Block


@dataclass(frozen=True, slots=True)
class ToFp4Codes:
    """The packed e2m1 codes of floats, rounded, as published; NVFP4 and INT4 are decoded first, and have operands of
    ``Convert``.
    """

    source: Source
    block: Block | None = None


@dataclass(frozen=True, slots=True)
class ToFp4Scales:
    """The e8m0 scales of those codes."""

    source: Source
    block: Block | None = None


@dataclass(frozen=True, slots=True)
class ToAffine:
    """A part of MLX's affine mode of eight bits: elements are decoded to BF16 first; operands are those of ``Convert``.

    ``group`` elements of a row share a scale and a bias.
    """

    part: Literal["codes", "scales", "biases"]
    source: Source
    block: Block | None
    group: int


Operation: TypeAlias = (
    Copy
    | Keep
    | Convert
    | Quantise
    | Beside
    | Columns
    | Join
    | AllEqual
    | Fill
    | Constant
    | Fp4ToFp8Codes
    | Fp4ToFp8Scales
    | Fp4ToNvfp4Codes
    | Fp4ToNvfp4Scales
    | Fp4ToNvfp4Second
    | Bf16ToFp8Codes
    | Bf16ToFp8Scales
    | SpreadScales
    | ToFp8Codes
    | ToFp8Scales
    | ToFp4Codes
    | ToFp4Scales
    | ToAffine
)

COPY, KEEP, JOIN, ALL_EQUAL = Copy(), Keep(), Join(), AllEqual()
NVFP4_CODES, NVFP4_SCALES, NVFP4_SECOND = Fp4ToNvfp4Codes(), Fp4ToNvfp4Scales(), Fp4ToNvfp4Second()


def copy(holds: str = "", is_repeated: bool = False) -> Copy:
    """Return the copy of elements of a safetensors dtype, one object for all of the kind."""
    return _copy(holds, is_repeated)


@cache  # takes any arguments, to those who check types
def _copy(holds: str, is_repeated: bool) -> Copy:
    return Copy(is_repeated, holds)


def convert(source: Source, target: Target, block: Block | None = None) -> Convert:
    """Return the conversion of ``source`` to ``target``, one object for all of the kind.

    Raises:
        InventoryError: there is no codec for it.
    """
    return _conversion(source, target, block)


@cache  # likewise
def _conversion(source: Source, target: Target, block: Block | None) -> Convert:
    if (source, target) not in CONVERSIONS:
        raise InventoryError(f"no codec makes {target} of {source}", hint="choose another output type")
    return Convert(source, target, block)


class Operand(NamedTuple):
    """A row-major matrix in a source file: one input of an operation.

    ``row_bytes`` bytes a row, each of numpy dtype ``dtype``; one row of it serves ``rows_per`` rows of
    the output (1 for weights, the block's height for scales). ``scale_form`` says how the file holds scales that
    operations take as the E8M0 bytes or float32 that they stand for; ``row_bytes`` are those of the file.
    """

    file: Path
    offset: int
    row_bytes: int
    rows_per: int
    dtype: str
    scale_form: ScaleForm | None = None


class Segment(NamedTuple):
    """A contiguous run of output rows that one operation makes: the unit of work, of checksums and of resume."""

    operation: Operation
    operands: tuple[Operand, ...]
    rows: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        """Return how many output bytes the segment makes."""
        return self.rows * self.row_bytes

    def bytes_read(self, operand: Operand) -> int:
        """Return how many bytes of one of its operands the segment reads, from ``operand.offset`` on."""
        return -(-self.rows // operand.rows_per) * operand.row_bytes


class OutputTensor(NamedTuple):
    """A tensor of an output file: ``nbytes`` at ``offset`` from the file's start, made by ``segments`` in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    segments: Sequence[Segment]


@dataclass(frozen=True, init=False)
class OutputFile:
    """A file of the output: ``header`` at its start, tensors behind it, zeros between them.

    ``same_as`` is a file of the source that has these very bytes, where there is one: the two may share them. Headers
    are kept compressed: those of three hundred thousand tensors, and their index, take fifty megabytes otherwise.
    """

    name: str
    header_bytes: int
    tensors: tuple[OutputTensor, ...] = field(repr=False)
    nbytes: int
    same_as: Path | None
    _header: bytes = field(repr=False)

    def __init__(
        self, name: str, header: bytes, tensors: tuple[OutputTensor, ...], nbytes: int, same_as: Path | None = None
    ) -> None:
        for key, value in (
            ("name", name),
            ("header_bytes", len(header)),
            ("tensors", tensors),
            ("nbytes", nbytes),
            ("same_as", same_as),
            ("_header", zlib.compress(header, level=1)),
        ):
            object.__setattr__(self, key, value)

    @property
    def header(self) -> bytes:
        """Return the bytes at the file's start."""
        return zlib.decompress(self._header, bufsize=max(1, self.header_bytes))


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
    appears in the folder ``destination``. ``options`` are the choices that decide the output's bytes. ``consumes`` are
    the source files that are used up: each is cut to so many bytes once the output holds all that is read of it.
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
    consumes: tuple[tuple[Path, int], ...] = ()

    @property
    def nbytes(self) -> int:
        """Return the bytes of all output files."""
        return sum(file.nbytes for file in self.files)

    @property
    def n_tensors(self) -> int:
        """Return the number of output tensors."""
        return sum(len(file.tensors) for file in self.files)

    def tensors(self) -> Iterator[OutputTensor]:
        """Yield the tensors of all output files."""
        return chain.from_iterable(file.tensors for file in self.files)

    def segments(self) -> Iterator[Segment]:
        """Yield the segments of all tensors."""
        return chain.from_iterable(tensor.segments for tensor in self.tensors())

    @cached_property
    def source_files(self) -> tuple[Path, ...]:
        """Return the files that the segments read, in the order of their first use."""
        return tuple(dict.fromkeys(chain.from_iterable(files_of(tensor.segments) for tensor in self.tensors())))

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

    @property
    def sizes(self) -> Iterable[int]:
        """Return how many output bytes each segment makes."""
        return (segment.nbytes for segment in self)

    @property
    def files(self) -> Iterable[Path]:
        """Return the file of each operand, or each file once, in order."""
        return (operand.file for segment in self for operand in segment.operands)

    @property
    def operation(self) -> Operation:
        """Return the operation of the first segment, which there is."""
        return self._make(0).operation

    def identity(self, names: Mapping[Path, str]) -> bytes:
        """Return what tells the segments from others, as ``identity_of`` does."""
        return _identity_of_each(self, names)

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

    ``holds`` is the safetensors dtype of the elements. ``is_repeated``: the same segments stand in several files of
    the output.
    """

    __slots__ = ("_nbytes", "_operation", "file", "offset")

    def __init__(self, file: Path, offset: int, nbytes: int, holds: str = "", is_repeated: bool = False) -> None:
        self.file = file
        self._operation = copy(holds, is_repeated)
        self.offset = offset
        self._nbytes = nbytes

    @property
    def nbytes(self) -> int:
        """Return how many bytes are copied."""
        return self._nbytes

    @property
    def files(self) -> Iterable[Path]:
        """Return the one file."""
        return (self.file,)

    def identity(self, names: Mapping[Path, str]) -> bytes:
        """Return what tells the copies from others: where all of their bytes lie."""
        return f"{text_of(self._operation)} {names[self.file]} {self.offset} {self._nbytes}\n".encode()

    def __len__(self) -> int:
        return -(-self._nbytes // COPY_SEGMENT_BYTES)

    def _make(self, number: int) -> Segment:
        begin = number * COPY_SEGMENT_BYTES
        operand = Operand(self.file, self.offset + begin, 1, 1, "u1")
        return Segment(self._operation, (operand,), min(COPY_SEGMENT_BYTES, self._nbytes - begin), 1)


def total_bytes(segments: Sequence[Segment]) -> int:
    """Return how many output bytes segments make together."""
    if isinstance(segments, MadeSegments):
        return segments.nbytes  # of copies one object for all tensors of the size, where a sum makes another
    return sum(segment.nbytes for segment in segments)


def sizes_of(tensor: OutputTensor) -> Iterable[int]:
    """Return how many bytes each segment of a tensor makes; the segments are not made for it where that can be told."""
    segments = tensor.segments
    if len(segments) == 1:
        return (tensor.nbytes,)
    return segments.sizes if isinstance(segments, MadeSegments) else (segment.nbytes for segment in segments)


def operation_of(segments: Sequence[Segment]) -> Operation | None:
    """Return the operation of the first segment, None where there is no segment; it is not made where that can be told.

    >>> operation_of(CopySegments(Path("model.safetensors"), 0, 4096))
    Copy(is_repeated=False, holds='')
    """
    if not len(segments):
        return None
    return segments.operation if isinstance(segments, MadeSegments) else segments[0].operation


def files_of(segments: Sequence[Segment]) -> Iterable[Path]:
    """Return the source files that segments read, in order, some of them repeatedly."""
    if isinstance(segments, MadeSegments):
        return segments.files
    return (operand.file for segment in segments for operand in segment.operands)


def identity_of(segments: Sequence[Segment], names: Mapping[Path, str]) -> bytes:
    """Return what tells segments from others: operations, sizes and where operands lie, files by ``names``."""
    return segments.identity(names) if isinstance(segments, MadeSegments) else _identity_of_each(segments, names)


def _identity_of_each(segments: Iterable[Segment], names: Mapping[Path, str]) -> bytes:
    lines: list[str] = []
    for operation, operands, rows, row_bytes in segments:
        lines.append(f"{text_of(operation)} {rows} {row_bytes}\n")
        lines += [f"{names[operand.file]} {operand[1:]}\n" for operand in operands]
    return "".join(lines).encode()


@lru_cache(maxsize=1024)  # one object of a kind serves all its segments
def text_of(operation: Operation) -> str:
    """Return an operation as text."""
    return str(operation)


def align_up(value: int, alignment: int) -> int:
    """Return the smallest multiple of ``alignment`` that is at least ``value``."""
    return -(-value // alignment) * alignment


def at_offset(tensor: OutputTensor, offset: int) -> OutputTensor:
    """Return the tensor at another offset."""
    # ``_replace`` takes three times as long.
    return OutputTensor(tensor.name, tensor.dtype, tensor.shape, offset, tensor.nbytes, tensor.segments)


def place(specs: Sequence[OutputTensor], start: int, alignment: int) -> Iterator[OutputTensor]:
    """Yield the tensors with offsets from ``start`` on, each aligned to ``alignment`` bytes."""
    position = start
    for tensor in specs:
        position = align_up(position, alignment)
        yield at_offset(tensor, position)
        position += tensor.nbytes
