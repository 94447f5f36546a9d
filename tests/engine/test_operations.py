"""Operations: each conversion of a plan has its codec, and a misspelt one does not type-check."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dsv4convert.engine.operations import (
    BY_WAY_OF_F32,
    DTYPES,
    MOVED,
    OF_INT4,
    PLAIN,
    SCALED,
    divides_blocks,
    make_tile,
)
from dsv4convert.errors import InventoryError, LossyError
from dsv4convert.formats.backend import numpy_codecs
from dsv4convert.formats.base import Scratch, Tally
from dsv4convert.formats.e8m0 import e8m0_to_f32
from dsv4convert.plan import ALL_EQUAL, CONVERSIONS, COPY, JOIN, KEEP, Beside, Columns, Operation, SpreadScales, convert

from ..type_checks import type_check


def made(operation: Operation, *inputs: np.ndarray, row_bytes: int) -> np.ndarray:
    out = np.full((len(inputs[0]), row_bytes), 0xA5, np.uint8)
    make_tile(operation, numpy_codecs(), inputs, out, Scratch(), Tally())
    return out


def test_each_conversion_of_a_plan_is_in_one_table() -> None:
    tables = [set(SCALED), set(PLAIN), set(MOVED), set(BY_WAY_OF_F32), set(OF_INT4)]
    assert set().union(*tables) == CONVERSIONS
    assert sum(map(len, tables)) == len(CONVERSIONS)
    assert {target for _, target in CONVERSIONS} == set(DTYPES)


@pytest.mark.parametrize(("source", "target"), sorted(SCALED | PLAIN))
def test_a_codec_is_the_one_that_its_names_say(source: str, target: str) -> None:
    table = SCALED if (source, target) in SCALED else PLAIN
    codecs = numpy_codecs()
    codes = "fp4" if source == "nvfp4" else source  # whose scales are float32 once they are read
    assert table[source, target](codecs) is getattr(codecs, f"{codes}_to_{target}")  # type: ignore[index, operator]


def test_equal_conversions_are_one_object() -> None:
    assert convert("fp8", "q8_0", (128, 128)) is convert("fp8", "q8_0", (128, 128))
    assert convert("fp8", "q8_0", (128, 128)) is not convert("fp8", "q8_0", (32, 32))


def test_a_conversion_without_a_codec_is_refused() -> None:
    with pytest.raises(InventoryError, match="no codec makes mxfp4 of i64"):
        convert("i64", "mxfp4")


@pytest.mark.parametrize("times", [(1, 1), (1, 4), (128, 4), (32, 1)])
@pytest.mark.parametrize("rows", [1, 31, 128, 300])
def test_scales_of_blocks_spread_over_rows_and_groups(times: tuple[int, int], rows: int) -> None:
    columns = 7
    grid = np.random.default_rng(rows).integers(0, 256, (-(-rows // times[0]), -(-columns // times[1])), dtype=np.uint8)
    grid.flat[: 256 % (grid.size + 1)] = np.arange(256, dtype=np.uint8)[: 256 % (grid.size + 1)]
    wanted = [[grid[row // times[0], column // times[1]] for column in range(columns)] for row in range(rows)]
    out = np.full((rows, columns), 0xA5, np.uint8)
    for scale in (grid, e8m0_to_f32(grid)):
        make_tile(SpreadScales(times), numpy_codecs(), [scale], out, Scratch(), Tally())
        assert out.tolist() == wanted


@pytest.mark.parametrize("value", [0.0, -1.0, 3.0, 2.0**-128, np.inf, np.nextafter(np.float32(1), np.float32(2))])
def test_a_scale_that_is_no_power_of_two_does_not_spread(value: float) -> None:
    scale, out = np.array([[1, value]], np.float32), np.empty((1, 2), np.uint8)
    with pytest.raises(LossyError, match="a scale that is no power of two"):
        make_tile(SpreadScales((1, 1)), numpy_codecs(), [scale], out, Scratch(), Tally())


def test_every_e8m0_byte_spreads_as_it_is() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for scale in (every, e8m0_to_f32(every)):
        out = np.empty((32, 48), np.uint8)
        make_tile(SpreadScales((2, 3)), numpy_codecs(), [scale], out, Scratch(), Tally())
        assert np.array_equal(out[::2, ::3], every)
        assert np.array_equal(out[1::2, 2::3], every)


def test_bytes_that_only_move() -> None:
    left, right = np.arange(6, dtype=np.uint8).reshape(2, 3), np.arange(10, 14, dtype=np.uint8).reshape(2, 2)
    assert np.array_equal(made(KEEP, left, row_bytes=3), left)
    assert np.array_equal(made(Columns(1, 3), left, row_bytes=2), left[:, 1:])
    joined = np.concatenate([left, right], axis=1)
    assert np.array_equal(made(JOIN, left, right, row_bytes=5), joined)
    assert np.array_equal(made(Beside(KEEP, KEEP, 3), left, right, row_bytes=5), joined)
    assert np.array_equal(made(ALL_EQUAL, left, left.copy(), row_bytes=3), left)
    with pytest.raises(InventoryError, match="ranks 0 and 2 hold different bytes"):
        made(ALL_EQUAL, left, left, left + 1, row_bytes=3)
    with pytest.raises(TypeError, match="a copy has no tiles"):
        made(COPY, left, row_bytes=3)


def test_rows_beside_each_other_may_be_of_different_operations() -> None:
    values = np.array([[1.5, -2.0]], np.float32)
    out = made(Beside(convert("f32", "bf16"), KEEP, 4), values, np.array([[7, 8]], np.uint8), row_bytes=6)
    assert out.tobytes() == b"\xc0\x3f\x00\xc0\x07\x08"


def test_only_operations_on_any_rows_of_a_block_divide_blocks() -> None:
    assert divides_blocks(convert("fp8", "bf16", (128, 128)))
    assert divides_blocks(Beside(KEEP, KEEP, 1))
    assert not divides_blocks(convert("fp4", "bf16", (1, 32)))
    assert not divides_blocks(ALL_EQUAL)


MISSPELT = {
    "a source": 'convert("fp9", "bf16")',
    "a target": 'convert("fp8", "q8_1")',
    "an argument": 'Convert("fp8", "bf16", blocks=(1, 1))',
    "a codec as text": 'Segment("fp8_to_bf16", (), 1, 1)',
    "an operation where only rows fit": "Beside(COPY, KEEP, 4)",
    "a codec of a backend": 'Codecs("mine", fp8_to_bf17=numpy_codecs().fp8_to_bf16)',
    "a codec of another kind": 'Codecs("mine", fp8_to_bf16=numpy_codecs().f32_to_bf16)',
}


def test_misspelt_operations_do_not_type_check(tmp_path: Path) -> None:
    lines = [
        "from dsv4convert.formats.backend import Codecs, numpy_codecs",
        "from dsv4convert.plan import COPY, KEEP, Beside, Convert, Segment, convert",
        'convert("fp8", "bf16", (128, 128))',
        *MISSPELT.values(),
    ]
    module = tmp_path / "misspelt.py"
    module.write_text("\n".join(lines) + "\n")
    found = type_check(module)
    wrong = {int(line.split(":")[0]) for line in found if " error: " in line}
    assert wrong == set(range(4, 4 + len(MISSPELT))), found
