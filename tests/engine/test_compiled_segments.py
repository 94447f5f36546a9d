"""Segments made by the compiled library: the same bytes, digests and counts as in Python, and the same errors."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from dsv4convert.engine import compiled_segments
from dsv4convert.engine.compiled_segments import CompiledSegment
from dsv4convert.engine.conversion import execute
from dsv4convert.engine.kernel_copy import KernelCopier
from dsv4convert.engine.mappings import SHARERS, Mappings
from dsv4convert.engine.operations import loaded_quantiser
from dsv4convert.engine.outputs import OPEN_FILES_PER_WORKER, DescriptorCache
from dsv4convert.engine.worker import Worker
from dsv4convert.errors import DeviceError, InputOutputError, LossyError
from dsv4convert.formats import q8_0
from dsv4convert.formats.backend import Codecs, compiled_available, compiled_codecs, numpy_codecs
from dsv4convert.formats.base import Tally
from dsv4convert.formats.compiled.segments import Making, address_of, lies_in_memory
from dsv4convert.formats.ggml import find_quantiser
from dsv4convert.formats.ggml_types import BY_NAME
from dsv4convert.formats.not_finite import MAGNITUDES
from dsv4convert.plan import (
    ALL_EQUAL,
    ALL_ROWS,
    CONVERSIONS,
    NVFP4_CODES,
    NVFP4_SCALES,
    Columns,
    Fp4ToFp8Codes,
    Fp4ToFp8Scales,
    Join,
    LowBit,
    Operand,
    Operation,
    Quantise,
    Segment,
    Source,
    SquaredWeights,
    Sums,
    ToFp4Codes,
    ToFp4Scales,
    ToFp8Codes,
    ToFp8Scales,
    convert,
    copy,
)
from dsv4convert.scale_forms import PowersOfTwo

from .plans import PLANS, contents

pytestmark = pytest.mark.skipif(not compiled_available(), reason="the compiled codecs are not built for this machine")

ROWS, COLUMNS = 384, 416  # three blocks of 128 rows, and columns that are no multiple of 128
TILE_BYTES = 2**16  # several tiles
BEGIN = 777  # of a source's first byte, and of the output's: nothing is aligned
OUTPUT_BEGIN = 4097

MAP_FIXED = 0x10  # mmap lacks it

Matrix = tuple[np.ndarray, int]  # an operand, and how many rows of the output a row of it serves


def ordinary(kind: str, rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    """Return elements of a kind as weights have them."""
    rng = np.random.default_rng(len(kind))
    x = (rng.standard_normal((rows, columns)) * 0.02).astype(np.float32)
    return {
        "fp8": lambda: rng.integers(0, 0x7F, (rows, columns), np.uint8),
        "fp4": lambda: rng.integers(0, 256, (rows, columns // 2), np.uint8),
        "scale": lambda: rng.integers(113, 120, (rows, columns), np.uint8),
        "f32 scale": lambda: (2.0 ** rng.integers(-14, -7, (rows, columns))).astype(np.float32),
        "f32": lambda: x,
        "bf16": lambda: (x.view(np.uint32) >> 16).astype(np.uint16),
        "f16": lambda: x.astype(np.float16),
    }[kind]()


def conversions() -> Iterator[tuple[str, Operation, list[Matrix], int]]:
    """Yield a name, the operation, its operands and the bytes of an output row for all that the library converts."""
    for source, target in sorted(CONVERSIONS):
        row_bytes = compiled_segments.output_bytes(target, COLUMNS)
        if row_bytes is None:  # ggml's NVFP4, which is Python's
            continue
        name = f"{source} to {target}"
        if (source, target) in compiled_segments._PLAIN:
            yield name, convert(source, target), [(ordinary(source), 1)], row_bytes
        elif (source, target) in compiled_segments._SCALED:
            height, width = block = (128, 128) if source == "fp8" else (1, 32)
            moved = (source, target) == ("fp4", "mxfp4")
            for scale in ["scale"] if moved else ["scale", "f32 scale"]:
                scales = ordinary(scale, ROWS // height, -(-COLUMNS // width))
                operation = convert(source, target, None if moved else block)
                yield f"{name}, {scale}", operation, [(ordinary(source), 1), (scales, height)], row_bytes


GROUPS = COLUMNS // 32


def quantisations() -> Iterator[tuple[str, Operation, list[Matrix], int]]:
    """Yield the same for codes and scales of floats."""
    source: Source
    for source in ("bf16", "f32"):
        x = ordinary(source)
        yield f"quantised {source} to fp8 codes", ToFp8Codes(source, (128, 128)), [(blocks(x, 128), 128)], COLUMNS
        # Blocks are small, so that the output is not too short for the library.
        yield f"quantised {source} to fp8 scales", ToFp8Scales(source, COLUMNS, (8, 32)), [(blocks(x, 8), 1)], GROUPS
        yield f"quantised {source} to fp4 codes", ToFp4Codes(source), [(x, 1)], COLUMNS // 2
        yield f"quantised {source} to fp4 scales", ToFp4Scales(source), [(x, 1)], GROUPS


def ggml_library() -> str:
    """Return the file of ggml's library; nowhere, where that is missing."""
    try:
        return find_quantiser().path
    except DeviceError:
        return ""


LARGE_BLOCKS: tuple[LowBit, ...] = ("q3_k", "tq1_0", "tq2_0", "q1_0", "q2_0")


def by_ggml() -> Iterator[tuple[str, Operation, list[Matrix], int]]:
    """Yield the same for types of ggml's library, with twins and without: rows of small blocks, and of large ones."""
    source: Source
    target: LowBit
    for target, columns in (("q4_0", COLUMNS), ("q5_1", COLUMNS), *[(kind, 512) for kind in LARGE_BLOCKS]):
        row_bytes = BY_NAME[target].row_bytes(columns)
        for source in ("bf16", "f16", "f32"):
            operation = Quantise(source, target, None, ggml_library())
            yield f"quantised {source} to {target}", operation, [(ordinary(source, columns=columns), 1)], row_bytes
        for source, (height, width) in (("fp8", (128, 128)), ("fp4", (1, 32))):
            for scale in ("scale", "f32 scale"):
                scales = ordinary(scale, ROWS // height, -(-columns // width))
                operation = Quantise(source, target, (height, width), ggml_library())
                operands = [(ordinary(source, columns=columns), 1), (scales, height)]
                yield f"quantised {source} to {target}, {scale}", operation, operands, row_bytes


def blocks(x: np.ndarray, height: int) -> np.ndarray:
    """Return a matrix with ``height`` rows in one."""
    return x.reshape(len(x) // height, -1)


NVFP4_OPERANDS: list[Matrix] = [
    (ordinary("scale", ROWS, GROUPS), 1),
    (blocks(ordinary("scale", ROWS, GROUPS), ROWS), ROWS),
    (blocks(ordinary("scale", ROWS, GROUPS) + np.uint8(3), ROWS), ROWS),
]
KINDS: dict[str, tuple[Operation, list[Matrix], int]] = {
    **{name: rest for name, *rest in (*conversions(), *quantisations(), *by_ggml())},
    "nvfp4 codes": (NVFP4_CODES, [(ordinary("fp4"), 1), *NVFP4_OPERANDS], COLUMNS // 2),
    "nvfp4 scales": (NVFP4_SCALES, NVFP4_OPERANDS, COLUMNS // 16),
    **{f"copy of {holds}": (copy(holds), [(ordinary("fp8").reshape(-1, 1), 1)], 1) for holds in MAGNITUDES},
    "copy of bytes": (copy(), [(ordinary("fp8").reshape(-1, 1), 1)], 1),
    "columns": (Columns(32, 164, "BF16"), [(ordinary("bf16"), 1)], 132),
    "join": (Join(("F16", "F16")), [(ordinary("f16"), 1), (ordinary("f16", columns=32), 1)], 2 * (COLUMNS + 32)),
    "fp4 to fp8 codes": (
        Fp4ToFp8Codes(128),
        [(ordinary("fp4"), 1), (ordinary("scale", ROWS // 128, 128 * GROUPS), 128)],
        COLUMNS,
    ),
    "fp4 to fp8 scales": (
        Fp4ToFp8Scales(2**9, 128),  # wider, so that the output is not too short for the library
        [(ordinary("scale", 8, 128 * 2**9), 1)],
        2**9 // 4,
    ),
}  # fmt: skip


def segment_of(kind: str, folder: Path) -> tuple[Segment, list[np.ndarray]]:
    """Write the operands of a kind to a source and return the segment with them."""
    operation, operands, row_bytes = KINDS[kind]
    if isinstance(operation, Quantise) and not operation.library:
        pytest.skip("ggml's library is not installed")
    places, at = [], BEGIN
    source = folder / "source"
    with source.open("wb") as file:
        for array, rows_per in operands:
            file.seek(at)
            file.write(array.tobytes())
            dtype = "u1" if isinstance(operation, Columns | Join) else array.dtype.str.replace("|", "")
            places.append(Operand(source, at, array[0].nbytes, rows_per, dtype))
            at += array.nbytes + 3
    rows = len(operands[0][0]) * operands[0][1]
    return Segment(operation, tuple(places), rows, row_bytes), [array for array, _ in operands]


def make(
    segment: Segment, codecs: Codecs, output: Path, sharers: int = 1, tile_bytes: int = TILE_BYTES
) -> tuple[bytes, bytes, Tally, int]:
    """Make a segment in a file of its own; return its bytes, digest, counts and operands of zeros."""
    output.write_bytes(bytes(OUTPUT_BEGIN + segment.nbytes + 5))
    with DescriptorCache() as descriptors, KernelCopier() as kernel, output.open("r+b") as file:
        worker = Worker(codecs, descriptors, kernel, {}, Mappings(), tile_bytes)
        worker.share(sharers)
        found = worker.run(segment, file.fileno(), output, OUTPUT_BEGIN)
    assert worker.done_bytes == segment.nbytes
    made = output.read_bytes()
    assert not any(made[:OUTPUT_BEGIN])
    assert not any(made[OUTPUT_BEGIN + segment.nbytes :])
    return made[OUTPUT_BEGIN:-5], *found


class Calls:
    """The rows at which the library began and ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ends: list[tuple[int, int]] = []
        real = CompiledSegment.make

        def noted(segment: CompiledSegment, first: int) -> int:
            self.ends.append((first, real(segment, first)))
            return self.ends[-1][1]

        monkeypatch.setattr(CompiledSegment, "make", noted)


def test_every_making_is_tested() -> None:
    made = {
        recipe.making
        for operation, operands, row_bytes in KINDS.values()
        if (
            recipe := compiled_segments.recipe_of(
                operation,
                tuple(
                    compiled_segments.Shape(
                        array[0].nbytes,
                        rows_per,
                        "u1" if isinstance(operation, Columns | Join) else array.dtype.str.replace("|", ""),
                    )
                    for array, rows_per in operands
                ),
                row_bytes,
            )
        )
    }
    assert made == set(Making)


@pytest.mark.parametrize("sharers", [1, SHARERS], ids=["written", "mapped"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_library_makes_what_python_makes(
    kind: str, sharers: int, tmp_path: Path, fast_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment, _ = segment_of(kind, tmp_path)
    wanted = make(segment, numpy_codecs(), tmp_path / "python")
    assert wanted[1] == xxhash.xxh3_128_digest(wanted[0])
    calls = Calls(monkeypatch)
    assert make(segment, compiled_codecs(), fast_tmp / "library", sharers) == wanted
    assert calls.ends == [(0, segment.rows)]


@pytest.mark.parametrize("kind", ["fp4 to q8_0, scale", "fp8 to q8_0, scale"])
def test_tables_that_no_cache_keeps_stay_as_long_as_the_library_reads_them(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for the first of two threads that ask for a table at once: the second one's takes its place in the cache."""
    segment, _ = segment_of(kind, tmp_path)
    wanted = make(segment, numpy_codecs(), tmp_path / "python")
    tables: list[weakref.ref[np.ndarray]] = []

    def forgotten(real: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
        def table() -> np.ndarray:
            made = real().copy()
            tables.append(weakref.ref(made))
            return made

        return table

    for name in ("multipliers", "d_table", "fp4_multipliers"):
        monkeypatch.setattr(q8_0, name, forgotten(getattr(q8_0, name)))
    made = CompiledSegment.make

    def checked(compiled: CompiledSegment, first: int) -> int:
        assert tables
        assert all(table() is not None for table in tables)
        return made(compiled, first)

    monkeypatch.setattr(CompiledSegment, "make", checked)
    assert make(segment, compiled_codecs(), tmp_path / "library") == wanted


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.startswith(("copy", "quantised", "nvfp4"))])
def test_a_tile_that_is_not_ordinary_is_made_in_python_and_the_others_are_not(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All bits of some rows in the middle are set, which means NaN in every format but FP4."""
    segment, _ = segment_of(kind, tmp_path)
    with (tmp_path / "source").open("r+b") as file:
        for operand in segment.operands:
            rows = segment.rows // operand.rows_per
            file.seek(operand.offset + rows // 2 * operand.row_bytes)
            file.write(b"\xff" * operand.row_bytes)
    wanted = make(segment, numpy_codecs(), tmp_path / "python")
    calls = Calls(monkeypatch)
    assert make(segment, compiled_codecs(), tmp_path / "library") == wanted
    assert calls.ends[-1][1] == segment.rows
    if len(calls.ends) > 1:
        assert sum(end - first for first, end in calls.ends) >= segment.rows // 3
    else:  # the formats that have no NaN, or whose bytes only move
        assert kind.startswith(("fp4 to mxfp4", "columns", "join"))


@pytest.mark.parametrize("kind", ["nvfp4 codes", "nvfp4 scales"])
def test_scales_that_nvfp4_lacks_are_for_python(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One too far below the others leaves its tile to Python; one that is NaN under the second scale leaves all."""
    segment, operands = segment_of(kind, tmp_path)
    own = len(operands) - 3
    _write(segment, own, b"\x01", operands[own].nbytes // 2)
    wanted = make(segment, numpy_codecs(), tmp_path / "python")
    assert bool(wanted[2].changed) == (kind == "nvfp4 codes")
    calls = Calls(monkeypatch)
    assert make(segment, compiled_codecs(), tmp_path / "library") == wanted
    assert len(calls.ends) > 1 or segment.nbytes < TILE_BYTES
    _write(segment, own + 2, b"\xff", 5)
    wanted = make(segment, numpy_codecs(), tmp_path / "python")
    calls.ends.clear()
    assert make(segment, compiled_codecs(), tmp_path / "library") == wanted
    assert sum(end - first for first, end in calls.ends) == 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("quantised")])
def test_what_cannot_be_quantised_is_told_as_by_python(kind: str, tmp_path: Path) -> None:
    segment, operands = segment_of(kind, tmp_path)
    which = int(kind.startswith("quantised fp4"))  # a code of FP4 is a number, its scale need not be
    _write(segment, which, b"\xff" * operands[which].itemsize, operands[which].nbytes // 2)
    told = []
    for codecs in (numpy_codecs(), compiled_codecs()):
        with pytest.raises(LossyError, match="NaN or infinite") as caught:
            make(segment, codecs, tmp_path / codecs.name)
        told.append(str(caught.value))
    assert told[0] == told[1]


@pytest.mark.parametrize("target", ["q4_0", "tq1_0", "q1_0"])
def test_blocks_that_a_twin_leaves_are_made_by_the_library(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some rows' scale is more than float16 holds."""
    segment, _ = segment_of(f"quantised f32 to {target}", tmp_path)
    row_bytes = segment.operands[0].row_bytes
    _write(segment, 0, np.full(row_bytes // 4, -3e30, "<f4").tobytes(), segment.rows // 2 * row_bytes)
    wanted = make(segment, numpy_codecs(), tmp_path / "python")
    calls = Calls(monkeypatch)
    assert make(segment, compiled_codecs(), tmp_path / "library") == wanted
    assert len(calls.ends) > 1
    assert calls.ends[-1][1] == segment.rows


SUMS = np.abs(np.random.default_rng(3).standard_normal(COLUMNS)).astype("<f4")
GGML_KINDS = [kind for kind in KINDS if isinstance(KINDS[kind][0], Quantise)]


@pytest.mark.parametrize("kind", GGML_KINDS)
def test_few_rows_at_a_time_are_quantised_as_all(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five of them, which do not divide a block of scales, in tiles of several blocks; one, where a row is too long."""
    segment, _ = segment_of(kind, tmp_path)
    wanted = make(segment, numpy_codecs(), tmp_path / "python")
    for wide_bytes in (5 * 4 * 512, 1):
        monkeypatch.setattr(compiled_segments, "WIDE_BYTES", wide_bytes)
        calls = Calls(monkeypatch)
        assert make(segment, compiled_codecs(), tmp_path / "library", tile_bytes=2**20) == wanted
        assert calls.ends == [(0, segment.rows)]


@pytest.mark.parametrize(
    "importance",
    [Sums(7, False), Sums(0, False), Sums(0, True), SquaredWeights()],
    ids=["counted", "not counted", "legacy", "squares"],
)
@pytest.mark.parametrize("kind", ["quantised fp8 to q4_0, scale", "quantised fp4 to q4_0, scale",
                                  "quantised f32 to q4_0"])  # fmt: skip
def test_the_library_quantises_with_the_weights_that_python_does(
    kind: str, importance: Sums | SquaredWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rows of a matrix: squares are those of all of them."""
    plain, _ = segment_of(kind, tmp_path)
    assert isinstance(plain.operation, Quantise)
    operands = plain.operands
    if isinstance(importance, Sums):
        (tmp_path / "sums").write_bytes(SUMS.tobytes())
        operands += (Operand(tmp_path / "sums", 0, SUMS.nbytes, ALL_ROWS, "<f4"),)
    else:
        operands += tuple(
            operand._replace(rows_per=ALL_ROWS, row_bytes=operand.row_bytes * (plain.rows // operand.rows_per))
            for operand in operands
        )
    segment = plain._replace(operation=replace(plain.operation, importance=importance), operands=operands, rows=256)
    wanted = make(segment, numpy_codecs(), tmp_path / "python")
    calls = Calls(monkeypatch)
    assert make(segment, compiled_codecs(), tmp_path / "library") == wanted
    assert calls.ends == [(0, segment.rows)]
    without = make(plain._replace(rows=256), compiled_codecs(), tmp_path / "without")
    assert without[0] != wanted[0]


@pytest.mark.parametrize("columns", [1, COLUMNS - 1])
def test_weights_of_other_columns_never_reach_the_library(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = segment_of("quantised f32 to q4_0", tmp_path)
    assert isinstance(plain.operation, Quantise)
    (tmp_path / "sums").write_bytes(SUMS.tobytes())
    sums = Operand(tmp_path / "sums", 0, 4 * columns, ALL_ROWS, "<f4")
    segment = plain._replace(
        operation=replace(plain.operation, importance=Sums(7, False)), operands=(*plain.operands, sums)
    )
    calls = Calls(monkeypatch)
    with pytest.raises(ValueError, match=f"expected {COLUMNS} weights of importance"):
        make(segment, compiled_codecs(), tmp_path / "library")
    assert calls.ends == []


def test_a_type_that_ggmls_library_lacks_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segment, _ = segment_of("quantised f32 to q4_0", tmp_path)
    monkeypatch.setitem(BY_NAME, "q4_0", BY_NAME["q4_0"]._replace(number=4))  # a type that was removed
    loaded_quantiser.cache_clear()
    with pytest.raises(DeviceError, match="does not have q4_0 as it is known here"):
        make(segment, compiled_codecs(), tmp_path / "library")
    loaded_quantiser.cache_clear()


WITH_ANOTHER = ["quantised bf16 to fp8 codes", "quantised f32 to fp8 codes", "quantised bf16 to fp4 codes",
                "quantised f32 to fp4 codes"]  # fmt: skip


@pytest.mark.parametrize("is_zero", [False, True], ids=["", "zeros"])
@pytest.mark.parametrize("kind", WITH_ANOTHER)
def test_what_is_found_with_codes_is_not_read_again(kind: str, is_zero: bool, tmp_path: Path) -> None:
    """Bytes, digest and counts of scales are those of a worker that makes them alone."""
    segment, operands = segment_of(kind, tmp_path)
    if is_zero:
        for number, array in enumerate(operands):
            _write(segment, number, bytes(array.nbytes))
    other = compiled_segments.known_with(segment)
    assert other is not None
    wanted = make(other, numpy_codecs(), tmp_path / "python")
    output = tmp_path / "library"
    output.write_bytes(bytes(segment.nbytes + other.nbytes))
    with DescriptorCache() as descriptors, KernelCopier() as kernel, output.open("r+b") as file:
        worker = Worker(compiled_codecs(), descriptors, kernel, {}, Mappings(), TILE_BYTES)
        worker.run(segment, file.fileno(), output, 0)
        os.truncate(tmp_path / "source", 0)
        found = worker.run(other, file.fileno(), output, segment.nbytes)
        assert (output.read_bytes()[segment.nbytes :], *found) == wanted
        assert worker.done_bytes == segment.nbytes + other.nbytes
        with pytest.raises(InputOutputError, match="shrank"):  # it is known once
            worker.run(other, file.fileno(), output, segment.nbytes)


def test_no_scales_are_known_where_python_made_a_tile(tmp_path: Path) -> None:
    segment, operands = segment_of("quantised f32 to fp4 codes", tmp_path)
    _write(segment, 0, np.float32(1e38).tobytes(), operands[0].nbytes // 2)
    other = compiled_segments.known_with(segment)
    assert other is not None
    output = tmp_path / "library"
    output.write_bytes(bytes(segment.nbytes + other.nbytes))
    with DescriptorCache() as descriptors, KernelCopier() as kernel, output.open("r+b") as file:
        worker = Worker(compiled_codecs(), descriptors, kernel, {}, Mappings(), TILE_BYTES)
        worker.run(segment, file.fileno(), output, 0)
        found = worker.run(other, file.fileno(), output, segment.nbytes)
    assert (output.read_bytes()[segment.nbytes :], *found) == make(other, numpy_codecs(), tmp_path / "python")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("bf16", "f16", "f32", "columns", "join"))])
def test_infinities_are_counted_as_in_python(kind: str, tmp_path: Path) -> None:
    """A few in the middle of the first operand and at the end of the last; then NaN beside them."""
    segment, operands = segment_of(kind, tmp_path)
    dtype = operands[0].dtype
    infinite, nan = {"<u2": (0x7F80, 0xFF81), "<f2": (np.inf, np.nan), "<f4": (-np.inf, np.nan)}[dtype.str]
    middle = segment.rows // 2 * segment.operands[0].row_bytes + 64
    _write(segment, 0, np.array([infinite] * 3, dtype).tobytes(), middle)
    _write(segment, len(operands) - 1, np.array([infinite], dtype).tobytes(), operands[-1].nbytes - dtype.itemsize)
    is_last_left_out = kind == "columns"
    wanted = make(segment, numpy_codecs(), tmp_path / "python")
    assert wanted[2].nan == 4 - is_last_left_out
    assert make(segment, compiled_codecs(), tmp_path / "library") == wanted
    _write(segment, 0, np.array([nan], dtype).tobytes(), middle)
    wanted = make(segment, numpy_codecs(), tmp_path / "python")
    assert wanted[2].nan == 4 - is_last_left_out
    assert make(segment, compiled_codecs(), tmp_path / "library") == wanted


def _write(segment: Segment, number: int, content: bytes, at: int = 0) -> None:
    operand = segment.operands[number]
    with operand.file.open("r+b") as file:
        file.seek(operand.offset + at)
        file.write(content)


@pytest.mark.parametrize("kind", KINDS)
def test_operands_of_zeros_are_found_as_in_python(kind: str, tmp_path: Path) -> None:
    """Every byte of one of them; then one byte is not, at its start, at its end and between."""
    segment, operands = segment_of(kind, tmp_path)
    for number, array in enumerate(operands):
        _write(segment, number, bytes(array.nbytes))
        wanted = make(segment, numpy_codecs(), tmp_path / "python")
        assert make(segment, compiled_codecs(), tmp_path / "library") == wanted
        assert wanted[3] == 1 << number
        for place in (0, array.nbytes // 2, array.nbytes - 1):
            _write(segment, number, b"\1", place)
            assert make(segment, compiled_codecs(), tmp_path / "library")[3] == 0, place
            _write(segment, number, b"\0", place)
        _write(segment, number, array.tobytes())


@pytest.mark.parametrize("where", [0, ROWS // 128 - 1], ids=["first", "last"])
def test_zeros_are_found_across_tiles_of_the_library_and_of_python(
    where: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale that is NaN leaves a tile to Python; all weights are zero, or one is not in a tile of either."""
    segment, (weights, scales) = segment_of("fp8 to bf16, scale", tmp_path)
    _write(segment, 0, bytes(weights.nbytes))
    _write(segment, 1, b"\xff" * scales[0].nbytes, where * scales[0].nbytes)
    calls = Calls(monkeypatch)
    assert make(segment, compiled_codecs(), tmp_path / "output")[3] == 1
    assert len(calls.ends) > 1
    for place in (0, weights.nbytes - 1):
        _write(segment, 0, b"\1", place)
        assert make(segment, compiled_codecs(), tmp_path / "output")[3] == 0
        _write(segment, 0, b"\0", place)


def test_scales_of_a_wider_type_are_left_to_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segment, (_, scales) = segment_of("fp8 to bf16, scale", tmp_path)
    wide = np.ldexp(np.float32(1), scales.astype(np.int32) - 127).astype("<f4")
    (tmp_path / "scales").write_bytes(wide.tobytes())
    element, scale = segment.operands
    stored = Operand(tmp_path / "scales", 0, wide[0].nbytes, scale.rows_per, "u1", PowersOfTwo("F32"))
    calls = Calls(monkeypatch)
    made = make(segment._replace(operands=(element, stored)), compiled_codecs(), tmp_path / "wide")
    assert not calls.ends
    assert made == make(segment, compiled_codecs(), tmp_path / "library")
    assert calls.ends == [(0, segment.rows)]


@pytest.mark.parametrize("nbytes", [1, 240, 241, 255, 256, 1024, 1025, 2**20, 2**20 + 1, 3 * 2**20 + 77])
@pytest.mark.parametrize("holds", ["", "F32", "BF16", "F8_E4M3"])
def test_copies_of_any_size_count_what_is_not_finite(holds: str, nbytes: int, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(np.random.default_rng(nbytes).bytes(nbytes))
    segment = Segment(copy(holds), (Operand(tmp_path / "source", 0, 1, 1, "u1"),), nbytes, 1)
    wanted = make(segment, numpy_codecs(), tmp_path / "python")
    assert make(segment, compiled_codecs(), tmp_path / "library") == wanted
    if nbytes > 1000:
        assert bool(wanted[2].nan) == bool(holds)


def test_what_the_library_does_not_make_is_left_to_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(bytes(5000))
    operand = Operand(tmp_path / "source", 0, 100, 1, "u1")
    calls = Calls(monkeypatch)
    for operation, operands, width in (
        (ALL_EQUAL, (operand, operand), 100),
        (Join(), (operand,) * (OPEN_FILES_PER_WORKER + 1), 100 * (OPEN_FILES_PER_WORKER + 1)),
        (Columns(0, 100), (operand._replace(row_bytes=200),), 100),
    ):
        make(Segment(operation, operands, 10, width), compiled_codecs(), tmp_path / "output")
    assert calls.ends == [(0, 10)]


def test_a_stopped_worker_begins_no_tile(tmp_path: Path) -> None:
    segment, _ = segment_of("fp8 to bf16, scale", tmp_path)
    output = tmp_path / "output"
    output.write_bytes(bytes(segment.nbytes))
    with DescriptorCache() as descriptors, KernelCopier() as kernel, output.open("r+b") as file:
        worker = Worker(compiled_codecs(), descriptors, kernel, {}, Mappings(), TILE_BYTES)
        worker.stopped = True
        worker.run(segment, file.fileno(), output, 0)
    assert worker.done_bytes == 0
    assert not any(output.read_bytes())


@pytest.mark.parametrize("sharers", [1, SHARERS], ids=["written", "mapped"])
def test_errors_are_those_of_python(sharers: int, tmp_path: Path, fast_tmp: Path) -> None:
    segment, _ = segment_of("fp8 to bf16, scale", tmp_path)
    os.truncate(tmp_path / "source", BEGIN + 100 * COLUMNS)
    with pytest.raises(InputOutputError, match=r"source: the file shrank while being read; was the file replaced"):
        make(segment, compiled_codecs(), fast_tmp / "output", sharers)


def test_a_limit_on_file_sizes_is_told_as_by_python(tmp_path: Path) -> None:
    """A tile in the middle has a part of its bytes written before the limit; then the error."""
    program = f"""
import resource
from pathlib import Path
from dsv4convert.errors import SpaceError
from tests.engine.test_compiled_segments import *
segment, _ = segment_of("fp8 to bf16, scale", Path({str(tmp_path)!r}))
output = Path({str(tmp_path / "output")!r})
output.write_bytes(b"")
resource.setrlimit(resource.RLIMIT_FSIZE, (200_001, 200_001))
with DescriptorCache() as descriptors, KernelCopier() as kernel, output.open("r+b") as file:
    worker = Worker(compiled_codecs(), descriptors, kernel, {{}}, Mappings(), TILE_BYTES)
    try:
        worker.run(segment, file.fileno(), output, 0)
    except SpaceError as error:
        print(error)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    told = f"{tmp_path / 'output'}: cannot be written (File too large); free some space and run again\n"
    assert (ended.stdout, ended.stderr) == (told, "")


@pytest.fixture
def memory(fast_tmp: Path) -> Path:
    """Return a folder on a tmpfs."""
    with (fast_tmp / "probe").open("w") as file:
        if not lies_in_memory(file.fileno()):
            pytest.skip("no tmpfs")
    return fast_tmp


def test_an_output_that_a_stranger_cuts_does_not_end_the_process(memory: Path, tmp_path: Path) -> None:
    """A store into a mapping behind the file's end would; the bytes are then written."""
    segment, _ = segment_of("fp8 to bf16, scale", tmp_path)
    wanted = make(segment, numpy_codecs(), tmp_path / "python")[0]
    output = memory / "output"
    output.write_bytes(bytes(segment.nbytes))
    mappings = Mappings()
    with DescriptorCache() as descriptors, KernelCopier() as kernel, output.open("r+b") as file:
        assert mappings.address(file.fileno())
        os.truncate(output, 100)
        worker = Worker(compiled_codecs(), descriptors, kernel, {}, mappings, TILE_BYTES)
        worker.share(SHARERS)
        worker.run(segment, file.fileno(), output, 0)
    assert output.read_bytes() == wanted


def test_a_mapped_output_does_not_count_as_memory(memory: Path, tmp_path: Path) -> None:
    nbytes = 2**26
    (tmp_path / "source").write_bytes(bytes(nbytes))
    segment = Segment(copy(), (Operand(tmp_path / "source", 0, 1, 1, "u1"),), nbytes, 1)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    output = memory / "output"
    output.write_bytes(bytes(nbytes))
    mappings = Mappings()
    with DescriptorCache() as descriptors, KernelCopier() as kernel, output.open("r+b") as file:
        worker = Worker(compiled_codecs(), descriptors, kernel, {}, mappings)
        worker.share(SHARERS)
        worker.run(segment, file.fileno(), output, 0)
        assert resident() - before < nbytes // 4


def test_memory_next_to_a_mapped_output_stays(memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are taken out of the mapping only, wherever among larger pages it starts."""
    segment, _ = segment_of("fp8 to bf16, scale", tmp_path)
    output = memory / "output"
    output.write_bytes(bytes(segment.nbytes))
    before = 2**20
    around = mmap.mmap(-1, 2 * before, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    around.write(b"\1" * 2 * before)
    start = address_of(memoryview(around)) + before + mmap.PAGESIZE
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    monkeypatch.setattr(Mappings, "address", lambda *_: start)
    with DescriptorCache() as descriptors, KernelCopier() as kernel, output.open("r+b") as file:
        flags = mmap.MAP_SHARED | MAP_FIXED
        assert libc.mmap(start, segment.nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, file.fileno(), 0) == start
        worker = Worker(compiled_codecs(), descriptors, kernel, {}, Mappings(), TILE_BYTES)
        worker.share(SHARERS)
        worker.run(segment, file.fileno(), output, 0)
    assert around[: before + mmap.PAGESIZE] == b"\1" * (before + mmap.PAGESIZE)
    assert around[before + mmap.PAGESIZE :][: segment.nbytes] == output.read_bytes()


def _resident_pages(path: Path) -> int:
    libc = ctypes.CDLL(None)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        found = ctypes.create_string_buffer(-(-len(mapped) // mmap.PAGESIZE))
        assert libc.mincore(address_of(memoryview(mapped)), len(mapped), found) == 0
    return sum(byte & 1 for byte in found.raw[:-1])


@pytest.mark.parametrize("drops", [False, True], ids=["kept", "dropped"])
def test_what_memory_cannot_cache_leaves_the_page_cache(drops: bool, tmp_path: Path) -> None:
    nbytes = 2**26 + 4096
    source, output = tmp_path / "source", tmp_path / "output"
    with source.open("wb") as file:
        file.write(np.random.default_rng(0).bytes(nbytes))
        file.flush()
        if lies_in_memory(file.fileno()):
            pytest.skip("temporary files lie in memory")
        os.fsync(file.fileno())
    segment = Segment(copy(), (Operand(source, 0, 1, 1, "u1"),), nbytes, 1)
    pages = _resident_pages(source)
    with DescriptorCache() as descriptors, KernelCopier() as kernel, output.open("w+b") as file:
        worker = Worker(compiled_codecs(), descriptors, kernel, {}, Mappings(), drops=drops)
        worker.run(segment, file.fileno(), output, 0)
    assert (_resident_pages(source) < pages // 2) == drops
    assert output.read_bytes() == source.read_bytes()


def test_files_on_a_disk_are_not_mapped(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        file.write(b"bytes")
        file.flush()
        if lies_in_memory(file.fileno()):
            pytest.skip("temporary files lie in memory")
        assert Mappings().address(file.fileno()) is None


@pytest.mark.parametrize("target", PLANS)
def test_eight_workers_in_memory_make_what_python_makes(
    target: str, tiny: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for name in ("library", "python"):
        (memory / name).mkdir()
        plan = PLANS[target](tiny, memory / name)
        if name == "python":
            monkeypatch.setenv("DSV4CONVERT_COMPILED", "0")
        summary = execute(plan, threads=2 * SHARERS)
        made.append((contents(plan), summary.counted and [dict(entry, file="") for entry in summary.counted]))
    assert made[0] == made[1]
