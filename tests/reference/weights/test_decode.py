"""Decoding stored matrices: whole, by runs of rows, by chosen rows, in every kind of storage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from dsv4convert.containers import sources
from dsv4convert.containers.fetching import Transport
from dsv4convert.errors import FileFormatError, InputMissingError
from dsv4convert.formats.base import Scratch, Tally
from dsv4convert.formats.e2m1 import quantise_fp4
from dsv4convert.formats.e4m3 import quantise_fp8
from dsv4convert.formats.ggml import find_quantiser
from dsv4convert.formats.ggml_decode import dequantise
from dsv4convert.formats.ggml_types import BY_NAME, QUANTISED
from dsv4convert.formats.mxfp4 import f32_to_mxfp4
from dsv4convert.formats.q8_0 import f32_to_q8_0
from dsv4convert.reference.weights import decode as stored
from dsv4convert.reference.weights.decode import Matrix, Scale, gather_rows, read_rows

Array = npt.NDArray[Any]

ROWS, COLUMNS, OFFSET = 300, 160, 24
BLOCK = (128, 128)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(b"\xaa" * OFFSET + data)
    return path


def make(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Matrix, Array]:
    """Return a matrix of ``kind`` on disk, and what it decodes to by definition."""
    monkeypatch.setattr(stored, "TILE_BYTES", 70 * COLUMNS * 4)  # several tiles, not aligned with anything
    x = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    where, scale_file = folder / "weight", folder / "scale"
    if kind in ("i32", "i64"):
        table = np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) * 7 - 1000
        return Matrix(write(where, table.astype(f"int{kind[1:]}").tobytes()), OFFSET, kind, ROWS, COLUMNS), table
    plain: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
    if kind in plain:
        narrow = x.astype(plain[kind])
        matrix = Matrix(write(where, narrow.tobytes()), OFFSET, kind, ROWS, COLUMNS)
        return matrix, narrow.astype(np.float32)
    if kind in ("q8_0", "mxfp4"):
        quantise, nbytes = {"q8_0": (f32_to_q8_0, 34), "mxfp4": (f32_to_mxfp4, 17)}[kind]
        blocks = np.empty((ROWS, COLUMNS // 32 * nbytes), np.uint8)
        quantise(x, blocks, Scratch(), Tally())
        matrix = Matrix(write(where, blocks.tobytes()), OFFSET, kind, ROWS, COLUMNS)
        parts = blocks.reshape(ROWS, -1, nbytes)
        if kind == "q8_0":
            d = parts[..., :2].copy().view(np.float16).astype(np.float32)
            expected = d * parts[..., 2:].view(np.int8)
        else:
            values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
            codes = np.concatenate([parts[..., 1:] & 15, parts[..., 1:] >> 4], axis=-1)
            signed = values[codes & 7] * np.where(codes & 8, -1, 1)
            expected = signed * 2.0 ** (parts[..., :1].astype(float) - 127)
        return matrix, expected.reshape(ROWS, COLUMNS).astype(np.float32)
    if kind == "fp4":
        codes, scales = quantise_fp4(x)
        nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(ROWS, COLUMNS)
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)[nibbles & 7]
        expected = np.where(nibbles & 8, -values, values)
        factor = np.repeat(2.0 ** (scales.astype(float) - 127), 32, axis=1)
        scale = Scale(write(scale_file, scales.tobytes()), OFFSET, "F8_E8M0", scales.shape, (1, 32))
    else:
        codes, scales = quantise_fp8(x, BLOCK)
        expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        power = 2.0 ** (scales.astype(float) - 127)
        factor = np.repeat(np.repeat(power, BLOCK[0], axis=0), BLOCK[1], axis=1)[:ROWS, :COLUMNS]
        if kind == "fp8-f32":
            scale = Scale(write(scale_file, power.astype(np.float32).tobytes()), OFFSET, "F32", scales.shape, BLOCK)
        else:
            scale = Scale(write(scale_file, scales.tobytes()), OFFSET, "F8_E8M0", scales.shape, BLOCK)
    matrix = Matrix(write(where, codes.tobytes()), OFFSET, kind[:3], ROWS, COLUMNS, scale)
    return matrix, (expected * factor).astype(np.float32)


KINDS = ["f32", "f16", "bf16", "fp8", "fp8-f32", "fp4", "q8_0", "mxfp4", "i32", "i64"]


@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_decode_by_definition(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, expected = make(kind, tmp_path, monkeypatch)
    decoded = read_rows(matrix)
    assert decoded.dtype == (np.int64 if kind.startswith("i") else np.float32)
    assert np.array_equal(decoded, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("first", "last"), [(0, 1), (127, 129), (130, 300), (299, 300), (128, 256)], ids=str)
def test_runs_of_rows_may_start_inside_a_block(
    kind: str, first: int, last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, expected = make(kind, tmp_path, monkeypatch)
    assert np.array_equal(read_rows(matrix, first, last), expected[first:last])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("indices", [[5], [299, 0, 130, 130], [4, 5, 6], []], ids=str)
def test_chosen_rows_come_in_the_order_asked(
    kind: str, indices: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, expected = make(kind, tmp_path, monkeypatch)
    rows = np.array(indices, np.int64)
    assert np.array_equal(gather_rows(matrix, rows), expected[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_threads_decode_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, expected = make(kind, tmp_path, monkeypatch)
    monkeypatch.setattr(stored, "THREADED_BYTES", 1)
    assert np.array_equal(read_rows(matrix), expected)
    assert np.array_equal(read_rows(matrix, 130, 291), expected[130:291])
    matrix.file.unlink()
    with pytest.raises(InputMissingError, match="no such file"):
        read_rows(matrix)


class Content(Transport):
    """Sends bytes, and counts how often each was sent."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.sent: Counter[int] = Counter()

    @contextmanager
    def fetch(self, begin: int, end: int) -> Iterator[Iterator[bytes]]:
        self.sent.update(range(begin, end))
        yield iter([self.content[begin:end]])


@pytest.mark.parametrize("is_wanted_again", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_remote_files_decode_the_same_and_are_fetched_once(
    kind: str, is_wanted_again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, expected = make(kind, tmp_path, monkeypatch)
    monkeypatch.setattr(stored, "THREADED_BYTES", 1)
    monkeypatch.setattr(stored, "GAP_BYTES", 2 * matrix.row_bytes)
    mount = sources.Mount(tmp_path, "hf://o/n", "0")
    monkeypatch.setattr(sources, "_files", {})
    sent = []
    for path in tmp_path.iterdir():
        transport = Content(path.read_bytes())
        mount.add(path.name, sources.RemoteFile(path.name, len(transport.content), "0", transport))
        path.write_bytes(b"")  # a stand-in
        sent.append(transport.sent)
    if is_wanted_again:
        sources.want_again(tmp_path)
        assert np.array_equal(read_rows(matrix, 0, 128), expected[:128])
    rows = np.array([299, 0, 3, 130, 130, 8])
    assert np.array_equal(gather_rows(matrix, rows), expected[rows])
    assert matrix.scale is not None or is_wanted_again or len(sent[0]) == (4 + 1 + 1 + 1) * matrix.row_bytes
    assert np.array_equal(read_rows(matrix), expected)
    assert np.array_equal(gather_rows(matrix, rows[::-1]), expected[rows[::-1]])
    assert {times for counts in sent for times in counts.values()} == {1}


def test_a_slice_of_rows_is_a_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, expected = make("mxfp4", tmp_path, monkeypatch)
    assert np.array_equal(read_rows(matrix.row_slice(100, 50)), expected[100:150])


def test_a_file_that_became_shorter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, _ = make("bf16", tmp_path, monkeypatch)
    matrix.file.write_bytes(matrix.file.read_bytes()[:-1])
    with pytest.raises(FileFormatError, match="weight: truncated"):
        read_rows(matrix)
    matrix.file.unlink()
    with pytest.raises(InputMissingError, match="no such file"):
        read_rows(matrix)


@pytest.mark.parametrize("kind", QUANTISED)
def test_low_bit_types_are_decoded_wherever_their_rows_lie(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    values = np.random.default_rng(5).standard_normal((9, 512), dtype=np.float32)
    stored = np.empty((9, BY_NAME[kind].row_bytes(512)), np.uint8)
    find_quantiser().quantise(kind, values, stored, np.ones(512, np.float32))
    (tmp_path / "weights").write_bytes(b"xyz" + stored.tobytes())
    matrix = Matrix(tmp_path / "weights", 3, kind, 9, 512)
    expected = dequantise(kind, stored)
    assert np.array_equal(read_rows(matrix), expected)
    assert np.array_equal(read_rows(matrix, 2, 5), expected[2:5])
    assert np.array_equal(gather_rows(matrix, np.array([8, 0, 3])), expected[[8, 0, 3]])
