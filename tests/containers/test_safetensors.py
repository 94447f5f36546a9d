"""Headers of safetensors files: what a good one says, and what each broken rule is called."""

# ruff: noqa: E501 - a table, one row a line

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dsv4convert.containers.safetensors import read_header
from dsv4convert.errors import FileFormatError, InputMissingError


def write(path: Path, header: Any, payload: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_file_of_the_safetensors_package_is_read_where_its_bytes_lie(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(3, 5)).astype(np.float32),
        "b": rng.integers(-9, 9, (7,), np.int8),
        "scalar": np.array(7, np.int64),
        "empty": np.zeros((0, 4), np.float32),
    }
    path = tmp_path / "a.safetensors"
    save_file(arrays, path, metadata={"format": "pt"})
    found = read_header(path)
    assert found.keys() == arrays.keys()
    data = path.read_bytes()
    for name, array in arrays.items():
        stored = found[name]
        assert stored.shape == array.shape
        assert data[stored.offset : stored.offset + stored.nbytes] == array.tobytes()


def test_packed_fp4_counts_elements_in_its_shape_and_half_of_them_in_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"w": entry("F4", [3, 6], 0, 9)}, bytes(9))
    assert read_header(path)["w"][1:] == ("F4", (3, 6), path.stat().st_size - 9, 9, None)


@pytest.mark.parametrize(
    ("header", "payload", "says"),
    [
        pytest.param({"w": entry("F32", [1], 0, 4), "v": entry("F32", [1], 3, 7)}, 7, "tensor 'v': overlaps the tensor before it: expected offset 4, got 3", id="overlap"),
        pytest.param({"w": entry("F32", [1], 0, 4), "v": entry("F32", [1], 5, 9)}, 9, "tensor 'v': leaves a hole before it: expected offset 4, got 5", id="hole"),
        pytest.param({"w": entry("F32", [1], 0, 4)}, 9, "bytes after the last tensor", id="trailing bytes"),
        pytest.param({"w": entry("F32", [1], 0, 4)}, 3, "tensor 'w': truncated, the data extends past the end of the file", id="truncated"),
        pytest.param({"w": entry("F32", [2], 0, 4)}, 4, "tensor 'w': bytes do not match dtype F32 and shape [2]: expected 8, got 4", id="shape"),
        pytest.param({"w": entry("F32", [-1], 0, 4)}, 4, "shape and offsets must be integers of 0 or more", id="negative"),
        pytest.param({"w": entry("F32", [True], 0, 4)}, 4, "shape and offsets must be integers", id="truth value"),
        pytest.param({"w": entry("F33", [1], 0, 4)}, 4, "tensor 'w': unknown dtype: got 'F33'", id="dtype"),
        pytest.param({"w": {"dtype": "F32", "shape": [1]}}, 4, "tensor 'w': malformed entry", id="no offsets"),
        pytest.param({"w": 7}, 4, "tensor 'w': malformed entry", id="no object"),
        pytest.param([], 0, "header is not a JSON object: got list", id="list"),
        pytest.param(b"", 0, "header is not valid JSON", id="empty"),
        pytest.param(b"{} {}", 0, "header is not valid JSON", id="two documents"),
        pytest.param(b'{"w":1,"w":2}', 0, "duplicate key 'w'", id="twice"),
        pytest.param(b'{"w": NaN}', 0, "NaN is no number in JSON", id="NaN"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_named(tmp_path: Path, header: Any, payload: int, says: str) -> None:
    path = write(tmp_path / "a.safetensors", header, bytes(payload))
    with pytest.raises(FileFormatError) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "shape", "begin", "end"),
    [
        pytest.param("U8", [True, 4], 4, 8, id="truth value for a size"),
        pytest.param("U8", [1.0, 4], 4, 8, id="fraction for a size"),
        pytest.param("U8", "[1, 4]", 4, 8, id="text for a shape"),
        pytest.param("U8", [1, 4], 4.0, 8, id="fraction for an offset"),
        pytest.param("U8", [1, 4], 4, 8.0, id="fraction for an end"),
        pytest.param("U8", [1, 4], True, 8, id="truth value for an offset"),
        pytest.param("U8", [1, 4], -4, 0, id="negative offset"),
        pytest.param("U8", [1, 4], 2**63, 2**63 + 4, id="offset beyond 63 bits"),
        pytest.param(["U8"], [1, 4], 4, 8, id="list for a dtype"),
        pytest.param("U8 [1, 4]", [], 4, 8, id="dtype with a shape in it"),
    ],
)
def test_a_broken_entry_is_told_from_a_sound_one_that_looks_like_it(
    tmp_path: Path, dtype: Any, shape: Any, begin: Any, end: Any
) -> None:
    broken = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    alone, after = write(tmp_path / "alone", {"w": broken}, bytes(8)), tmp_path / "after"
    write(after, {"v": entry("U8", [1, 4], 0, 4), "w": broken}, bytes(8))
    errors = []
    for path in (alone, after):
        with pytest.raises(FileFormatError, match="tensor 'w'") as caught:
            read_header(path)
        errors.append((caught.value.what, caught.value.expected, caught.value.got))
    assert errors[0] == errors[1]


def test_every_truncation_of_a_file_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"w": entry("F32", [3], 0, 12)}, bytes(range(12)))
    data = path.read_bytes()
    assert list(read_header(path)) == ["w"]
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(FileFormatError):
            read_header(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match=r"a\.safetensors: no such file"):
        read_header(tmp_path / "a.safetensors")
