"""Weights and their scales: the encoding and the block are read off dtypes and shapes alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4convert.checkpoint.weights import Encoding, pair
from dsv4convert.containers.safetensors import DTYPE_BITS, Stored
from dsv4convert.errors import InventoryError
from dsv4convert.model.config import load_config
from dsv4convert.model.tensors import Draft, Expected, expected_tensors


def stored(dtype: str, *shape: int) -> Stored:
    elements = 1
    for length in shape:
        elements *= length
    return Stored(Path("a.safetensors"), dtype, shape, 0, elements * DTYPE_BITS[dtype] // 8)


@pytest.fixture(scope="session")
def tables(tiny: Path) -> dict[str, Expected]:
    return {row.name: row for row in expected_tensors(load_config(tiny), Draft.NONE, 0, has_vision=False)}


@pytest.fixture
def dense(tables: dict[str, Expected]) -> Expected:
    return tables["layers.0.attn.wq_a.weight"]


@pytest.fixture
def expert(tables: dict[str, Expected]) -> Expected:
    return tables["layers.0.ffn.experts.0.w1.weight"]


@pytest.mark.parametrize(
    ("rows", "columns", "scales", "block"),
    [
        pytest.param(256, 256, (2, 2), (128, 128), id="even"),
        pytest.param(160, 300, (2, 3), (128, 128), id="ragged"),
        pytest.param(64, 96, (2, 3), (32, 32), id="blocks of 32"),
        pytest.param(100, 96, (1, 1), (128, 128), id="one block"),
        pytest.param(300, 7, (3, 7), (128, 1), id="a scale a column"),
    ],
)
def test_the_block_is_read_off_the_shapes(
    dense: Expected, rows: int, columns: int, scales: tuple[int, int], block: tuple[int, int]
) -> None:
    weight = pair(dense._replace(shape=(rows, columns)), stored("F8_E4M3", rows, columns), stored("F8_E8M0", *scales))
    assert (weight.encoding, weight.block) == (Encoding.FP8, block)


def test_f32_scales_are_scales_of_fp8(dense: Expected) -> None:
    rows, columns = dense.shape
    weight = pair(dense, stored("F8_E4M3", rows, columns), stored("F32", -(-rows // 128), -(-columns // 128)))
    assert weight.scale is not None
    assert weight.scale.dtype == "F32"


def test_packed_fp4_has_two_codes_a_byte_and_a_scale_for_32(expert: Expected) -> None:
    rows, columns = expert.shape
    weight = pair(expert, stored("I8", rows, columns // 2), stored("F8_E8M0", rows, columns // 32))
    assert (weight.encoding, weight.shape, weight.block) == (Encoding.FP4, expert.shape, (1, 32))


@pytest.mark.parametrize(
    ("dtype", "scale", "says"),
    [
        pytest.param("I8", None, "the scale of a I8 weight", id="packed without scale"),
        pytest.param("I8", ("F32", 1), "not the scale of packed FP4", id="packed with F32 scale"),
        pytest.param("I8", ("F8_E8M0", 16), "not the scale of packed FP4", id="a scale for 16"),
        pytest.param("BF16", ("F8_E8M0", 32), "unexpected scale", id="BF16 with scale"),
        pytest.param("F8_E5M2", None, "unknown encoding", id="an unknown float"),
        pytest.param("I64", None, "wrong dtype", id="integers"),
    ],
)
def test_what_does_not_fit_is_refused(expert: Expected, dtype: str, scale: tuple[str, int] | None, says: str) -> None:
    rows, columns = expert.shape
    columns_stored = columns // 2 if dtype == "I8" else columns
    beside = None if scale is None else stored(scale[0], rows, columns // scale[1])
    with pytest.raises(InventoryError, match=says) as caught:
        pair(expert, stored(dtype, rows, columns_stored), beside)
    assert expert.name.removesuffix(".weight") in str(caught.value)


def test_a_one_byte_tensor_is_not_taken_for_fp8(dense: Expected) -> None:
    rows, columns = dense.shape
    scale = stored("F8_E8M0", -(-rows // 128), -(-columns // 128))
    with pytest.raises(InventoryError, match="not the scale of packed FP4"):
        pair(dense, stored("U8", rows, columns), scale)
