"""The scalar formats code by code: e4m3, e2m1, e8m0 against ml_dtypes, torch and gguf-py, and the encoders."""

from __future__ import annotations

from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dsv4convert.errors import DeviceError
from dsv4convert.formats import e2m1, e4m3, e8m0, q8_0
from dsv4convert.formats.base import Scratch, require_subnormals
from tests.oracles.plain_codecs import bits_of

ALL_BYTES = np.arange(256, dtype=np.uint8)


def assert_same_values(left: np.ndarray, right: np.ndarray) -> None:
    """Bit for bit, NaN by mask."""
    nan = np.isnan(right)
    np.testing.assert_array_equal(np.isnan(left), nan)
    np.testing.assert_array_equal(bits_of(left)[~nan], bits_of(right)[~nan])


def test_every_e8m0_byte_is_ml_dtypes_value():
    assert_same_values(e8m0.e8m0_to_f32(ALL_BYTES), ALL_BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32))


def test_every_e8m0_byte_is_torchs_value():
    theirs = torch.from_numpy(ALL_BYTES).view(torch.float8_e8m0fnu).to(torch.float32).numpy()
    assert_same_values(e8m0.e8m0_to_f32(ALL_BYTES), theirs)


def test_gguf_py_agrees_on_every_e8m0_byte_but_the_last():
    half = gguf.quants.MXFP4.e8m0_to_fp32_half(ALL_BYTES)
    ours = e8m0.e8m0_to_f32(ALL_BYTES)
    # The known disagreement: it reads NaN as a number.
    assert np.isnan(ours[255])
    assert np.isfinite(half[255])
    np.testing.assert_array_equal(ours[:255] / 2, half[:255])


def test_every_e8m0_byte_survives_the_round_trip():
    np.testing.assert_array_equal(e8m0.f32_to_e8m0(e8m0.e8m0_to_f32(ALL_BYTES)), ALL_BYTES)


@pytest.mark.parametrize("value", [0.0, -1.0, 3.0, 1.0000001, float("inf"), 2.0**-128])
def test_a_float_that_is_no_e8m0_scale_is_refused(value: float):
    with pytest.raises(ValueError, match="power of two"):
        e8m0.f32_to_e8m0(np.array([1.0, value], np.float32))


def test_every_e4m3_code_is_ml_dtypes_and_torchs_value():
    ours = e4m3.e4m3_to_f32(ALL_BYTES)
    assert_same_values(ours, ALL_BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert_same_values(ours, torch.from_numpy(ALL_BYTES).view(torch.float8_e4m3fn).to(torch.float32).numpy())


def test_every_e2m1_code_is_ml_dtypes_value_and_code_8_is_minus_zero():
    codes = ALL_BYTES[:16]
    assert_same_values(e2m1.VALUES, codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32))
    assert np.signbit(e2m1.VALUES[8])


def test_gguf_py_agrees_on_every_e2m1_code_but_minus_zero():
    theirs = np.array(gguf.quants.MXFP4.kvalues, np.float32) / 2
    np.testing.assert_array_equal(theirs, e2m1.VALUES)  # 0.0 == -0.0
    assert not np.signbit(theirs[8])


def test_every_packed_byte_survives_the_round_trip():
    np.testing.assert_array_equal(e2m1.pack_e2m1(e2m1.unpack_e2m1(ALL_BYTES)), ALL_BYTES)


def test_the_low_nibble_comes_first():
    np.testing.assert_array_equal(e2m1.unpack_e2m1(np.array([[0x21, 0x43]], np.uint8)), [[1, 2, 3, 4]])


def every_bfloat16() -> np.ndarray:
    return (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)


def test_e4m3_encoder_rounds_every_bfloat16_as_ml_dtypes_and_saturates():
    values = every_bfloat16()
    ours = e4m3.f32_to_e4m3(values)
    inside = np.abs(values) <= 448
    theirs = values[inside].astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(ours[inside], theirs)
    above = np.abs(values) > 448
    np.testing.assert_array_equal(ours[above] & 0x7F, 0x7E)
    np.testing.assert_array_equal(ours[above] >> 7, np.signbit(values[above]))
    np.testing.assert_array_equal(ours[np.isnan(values)], 0x7F)


def test_e2m1_encoder_rounds_every_bfloat16_as_ml_dtypes_and_saturates():
    values = every_bfloat16()
    values = values[~np.isnan(values)]
    ours = e2m1.f32_to_e2m1(values)
    inside = np.abs(values) <= 6
    theirs = values[inside].astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    np.testing.assert_array_equal(ours[inside], theirs)
    np.testing.assert_array_equal(ours[~inside] & 7, 7)


def neighbours_of_midpoints(codes: np.ndarray) -> np.ndarray:
    """Every midpoint between two values, and the float32 on either side of it."""
    values = np.unique(codes[np.isfinite(codes)])
    middle = ((values[:-1].astype(np.float64) + values[1:]) / 2).astype(np.float32)
    return np.concatenate([middle, np.nextafter(middle, -np.inf), np.nextafter(middle, np.inf)]).astype(np.float32)


def test_e4m3_encoder_is_right_around_every_midpoint():
    values = neighbours_of_midpoints(e4m3.e4m3_to_f32(ALL_BYTES))
    theirs = values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(e4m3.f32_to_e4m3(values), theirs)


def test_e2m1_encoder_is_right_around_every_midpoint():
    values = neighbours_of_midpoints(e2m1.VALUES)
    theirs = values.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    np.testing.assert_array_equal(e2m1.f32_to_e2m1(values), theirs)


def test_nan_has_no_e2m1_code():
    with pytest.raises(ValueError, match="no NaN"):
        e2m1.f32_to_e2m1(np.array([1.0, np.nan], np.float32))


@pytest.mark.parametrize("block", [(128, 128), (32, 32), (1, 32), (5, 7)], ids=str)
def test_fp8_quantiser_takes_the_smallest_scale_that_fits(block: tuple[int, int]):
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((131, 70)) * np.exp2(rng.uniform(-30, 30, (131, 1)))).astype(np.float32)
    x[:40, :40] = 0
    codes, scale = e4m3.quantise_fp8(x, block)
    for r in range(scale.shape[0]):
        for c in range(scale.shape[1]):
            part = np.s_[r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]]
            amax = float(np.abs(x[part]).max())
            power = 2.0 ** (int(scale[r, c]) - 127)
            assert amax <= 448 * power
            assert amax > 448 * power / 2 or scale[r, c] == 1
            near = (x[part].astype(np.float64) / power).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
            np.testing.assert_array_equal(codes[part], near)


def test_fp4_quantiser_takes_the_smallest_scale_that_fits():
    rng = np.random.default_rng(4)
    x = (rng.standard_normal((37, 96)) * np.exp2(rng.uniform(-30, 30, (37, 1)))).astype(np.float32)
    x[5] = 0
    packed, scale = e2m1.quantise_fp4(x)
    power = np.repeat(2.0 ** (scale.astype(float) - 127), 32, axis=1)
    amax = np.abs(x).reshape(37, 3, 32).max(axis=2)
    assert (amax <= 6 * power[:, ::32]).all()
    assert ((amax > 3 * power[:, ::32]) | (scale == 1)).all()
    near = (x / power).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    np.testing.assert_array_equal(e2m1.unpack_e2m1(packed), near)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_quantisers_refuse_what_is_no_number(bad: float):
    x = np.ones((4, 32), np.float32)
    x[2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        e4m3.quantise_fp8(x, (2, 32))
    with pytest.raises(ValueError, match="NaN or infinity"):
        e2m1.quantise_fp4(x)


def test_fp4_quantiser_refuses_a_row_that_is_no_whole_group():
    with pytest.raises(ValueError, match="32"):
        e2m1.quantise_fp4(np.ones((2, 33), np.float32))


@given(hnp.arrays(np.uint32, st.tuples(st.integers(1, 5), st.integers(1, 5))))
def test_scales_written_as_floats_are_recognised_exactly(bits: np.ndarray):
    scale = bits.view(np.float32)
    codes = e8m0.power_of_two_bytes(scale, Scratch())
    values = e8m0.e8m0_to_f32(ALL_BYTES[:255])
    all_scales = bool((np.isin(scale, values) & (scale > 0) | np.isnan(scale)).all())
    assert (codes is not None) == all_scales
    if codes is not None:
        assert_same_values(e8m0.e8m0_to_f32(codes), scale)


def test_every_scale_byte_written_as_a_float_is_recognised():
    scale = e8m0.e8m0_to_f32(ALL_BYTES).reshape(16, 16)
    np.testing.assert_array_equal(e8m0.power_of_two_bytes(scale, Scratch()).reshape(-1), ALL_BYTES)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32], ids=["BF16", "F32"])
def test_wide_scales_have_the_byte_of_their_power_of_two_or_none(dtype: type):
    """All BF16; all upper halves of F32 with the least and largest lower half."""
    upper = np.arange(2**16, dtype=np.uint32)
    wide = upper if dtype is np.uint16 else np.concatenate([upper << 16, upper << 16 | 1, upper << 16 | 0xFFFF])
    values = (wide << 16 if dtype is np.uint16 else wide).view(np.float32)
    powers = np.isin(values, [np.float32(2.0**exponent) for exponent in range(-127, 128)])
    right = powers | np.isnan(values)
    out = np.empty(np.count_nonzero(right), np.uint8)
    assert e8m0.wide_to_e8m0(wide[right].astype(dtype), out) is None
    np.testing.assert_array_equal(e8m0.e8m0_to_f32(out), values[right])
    for bits in wide[~right].astype(dtype)[:: 1 if dtype is np.uint16 else 101]:
        assert e8m0.wide_to_e8m0(np.array([[bits]], dtype), np.empty((1, 1), np.uint8)) == 0
    rows = np.resize(wide[right].astype(dtype), (5, 7))
    rows[3, 4] = wide[~right][-1]
    assert e8m0.wide_to_e8m0(rows, np.empty((5, 7), np.uint8)) == 3 * 7 + 4


def test_a_thread_that_flushes_subnormals_is_refused():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        with pytest.raises(DeviceError, match="subnormal"):
            require_subnormals()
    finally:
        torch.set_flush_denormal(False)
    require_subnormals()


def test_scratch_hands_out_the_same_memory_and_grows():
    scratch = Scratch()
    small = scratch.array("a", (2, 3), np.float32)
    assert small.shape == (2, 3)
    large = scratch.array("a", (100, 3), np.float64)
    again = scratch.array("a", (7,), np.uint8)
    assert np.shares_memory(large, again)
    assert not np.shares_memory(large, scratch.array("b", (100, 3), np.float64))
    assert scratch.nbytes == 2 * large.nbytes


def test_the_documented_exact_ranges_are_the_codecs():
    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    for row in (
        f"| e4m3 → float32 | 0 … {e4m3.F32_LAST_SAFE_BYTE} |",
        f"| e4m3 → bfloat16 | {e4m3.BF16_FIRST_EXACT_BYTE} … {e4m3.F32_LAST_SAFE_BYTE} |",
        f"| e4m3 → float16 | {e4m3.F16_FIRST_EXACT_BYTE} … {e4m3.F16_LAST_SAFE_BYTE} |",
        f"| e2m1 → float32, bfloat16 | 0 … {e2m1.F32_LAST_SAFE_BYTE} |",
        f"| e2m1 → float16 | {e2m1.F16_FIRST_EXACT_BYTE} … {e2m1.F16_LAST_SAFE_BYTE} |",
        f"scale with byte {q8_0.TABLE_FIRST_BYTE} … {q8_0.TABLE_LAST_BYTE},",
    ):
        assert row in text
