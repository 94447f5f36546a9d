"""The formulas of the second opinion, against libraries that have nothing to do with it."""

from __future__ import annotations

import gguf
import ml_dtypes
import numpy as np
import pytest

from dsv4convert.formats.base import Scratch, Tally
from dsv4convert.formats.mxfp4 import f32_to_mxfp4
from dsv4convert.verification import numbers

ALL_16_BITS = np.arange(2**16, dtype=np.uint16)
BYTES = np.arange(256, dtype=np.uint8)


def same_values(left: np.ndarray, right: np.ndarray) -> bool:
    """Equal, signs of zero included, NaN equal to NaN."""
    equal = (left == right) & (np.signbit(left) == np.signbit(right))
    return bool(np.all(equal | (np.isnan(left) & np.isnan(right))))


def test_e4m3_values_are_those_of_ml_dtypes() -> None:
    assert same_values(numbers.E4M3, BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float64))


def test_e2m1_values_are_those_of_ml_dtypes() -> None:
    theirs = BYTES[:16].view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    assert same_values(numbers.E2M1, theirs)


def test_e8m0_values_are_those_of_ml_dtypes() -> None:
    theirs = BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    assert same_values(numbers.e8m0_values(BYTES), theirs)


def test_bf16_and_f16_values_are_those_of_ml_dtypes_and_numpy() -> None:
    with np.errstate(invalid="ignore"):
        assert same_values(
            numbers.values_of("bf16", ALL_16_BITS), ALL_16_BITS.view(ml_dtypes.bfloat16).astype(np.float64)
        )
        assert same_values(numbers.values_of("f16", ALL_16_BITS), ALL_16_BITS.view(np.float16).astype(np.float64))


def test_fp8_value_is_code_times_scale_for_every_pair() -> None:
    scale = BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    code = BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert same_values(numbers.all_values("fp8").reshape(256, 256), scale[:, None] * code[None, :])


def test_fp8_under_a_float32_scale_is_the_exact_product() -> None:
    scale = np.float32(0.1)
    bits = (np.uint64(scale.view(np.uint32)) << np.uint64(8)) | BYTES.astype(np.uint64)
    assert same_values(numbers.values_of("fp8/f32", bits), numbers.E4M3 * np.float64(scale))


def neighbours_and_midpoints() -> np.ndarray:
    """Every finite bfloat16, the midpoint to the next one, and values just beside the midpoint."""
    grid = np.arange(0, 0x7F80, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float64)
    middle = (grid[:-1] + grid[1:]) / 2
    # Nearer to the midpoint than float32 can tell: rounding twice would go wrong.
    beside = [middle * (1 - 2.0**-40), middle * (1 + 2.0**-40)]
    positive = np.concatenate([grid, middle, *beside])
    return np.concatenate([positive, -positive])


def test_bf16_rounds_once_to_nearest_even() -> None:
    values = neighbours_and_midpoints()
    bits = numbers.bits_of("bf16", values)
    rounded = numbers.values_of("bf16", bits)
    grid = ALL_16_BITS[:0x7F80].view(ml_dtypes.bfloat16).astype(np.float64)
    above = np.clip(np.searchsorted(grid, np.abs(values)), 1, len(grid) - 1)
    up, down = grid[above] - np.abs(values), np.abs(values) - grid[above - 1]
    assert np.all(np.abs(np.abs(rounded) - np.abs(values)) == np.minimum(up, down))
    tie = up == down
    assert np.count_nonzero(tie) > 60_000
    assert np.all(bits[tie] % 2 == 0)
    assert np.all(np.signbit(rounded) == np.signbit(values))


def test_bf16_beyond_the_range_is_infinite() -> None:
    limit = 2.0**128 - 2.0**119  # halfway from the largest bfloat16 to 2^128
    values = np.array([limit, np.nextafter(limit, 0), -limit, np.inf, 1e300])
    assert numbers.bits_of("bf16", values).tolist() == [0x7F80, 0x7F7F, 0xFF80, 0x7F80, 0x7F80]
    assert numbers.bits_of("bf16", np.array([np.nan])).tolist() == [0x7FC0]


@pytest.mark.parametrize("spread", [0, 3, 12], ids=["one_scale", "near_scales", "far_scales"])
def test_q8_0_is_what_gguf_py_makes(spread: int) -> None:
    rng = np.random.default_rng(spread)
    x = (rng.standard_normal((64, 96)) * 2.0 ** rng.integers(-spread, spread + 1, (64, 96))).astype(np.float32)
    x[3] = 0
    x[4, ::2] = -0.0
    theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0).reshape(64, 3, 34)
    d = theirs[:, :, :2].copy().view(np.uint16).astype(np.uint32)
    expected = ((d << 8) | theirs[:, :, 2:]).reshape(64, 96)
    bits = numbers.bits_of("q8_0", x.astype(np.float64))
    assert np.array_equal(bits, expected)
    values = gguf.quants.dequantize(theirs.reshape(64, -1), gguf.GGMLQuantizationType.Q8_0)
    assert np.allclose(numbers.values_of("q8_0", bits), values, rtol=1e-7, atol=0)


def test_q8_0_rounds_half_away_from_zero() -> None:
    x = np.zeros((1, 32))
    x[0, :5] = [127, 0.5, -0.5, 1.5, 0.49999997]
    q = (numbers.bits_of("q8_0", x) & 0xFF).astype(np.uint8).view(np.int8)
    assert q[0, :5].tolist() == [127, 1, -1, 2, 0]


@pytest.mark.parametrize("seed", range(4))
def test_mxfp4_is_what_the_quantiser_makes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((256, 64)) * 2.0 ** rng.integers(-135, 120, (256, 64 // 32)).repeat(32, 1)
    x[0] = 0
    exact = numbers.E2M1[rng.integers(0, 16, (64, 64))] * 2.0 ** rng.integers(-127, 100, (64, 2)).repeat(32, 1)
    x[100:164] = exact
    x[5, 3], x[6, 40] = np.nan, np.inf
    x = x.astype(np.float32)
    blocks = np.zeros((256, 2 * 17), np.uint8)
    f32_to_mxfp4(x, blocks, Scratch(), Tally())
    parts = blocks.reshape(256, 2, 17)
    codes = np.concatenate([parts[:, :, 1:] & 0xF, parts[:, :, 1:] >> 4], axis=2)
    expected = ((parts[:, :, :1].astype(np.uint16) << 4) | codes).reshape(256, 64)
    assert np.array_equal(numbers.bits_of("mxfp4", x.astype(np.float64)), expected)


def test_fp4_as_fp8_keeps_values_and_takes_the_largest_scale_down_by_six() -> None:
    rng = np.random.default_rng(7)
    scale = rng.integers(100, 113, (130, 160 // 32)).repeat(32, 1)
    bits = ((scale << 4) | rng.integers(0, 16, (130, 160))).astype(np.uint16)
    made, exact = numbers.fp4_as_fp8_bits(bits)
    assert exact
    assert same_values(numbers.values_of("fp8", made), numbers.values_of("fp4", bits))
    assert np.all(made[:128, :128] >> 8 == scale[:128, :128].max() - 6)
    assert np.all(made[128:, 128:] >> 8 == scale[128:, 128:].max() - 6)


def test_fp4_as_fp8_rounds_what_is_far_below_its_tile_and_says_so() -> None:
    bits = np.full((2, 32), (127 << 4) | 7, np.uint16)
    bits[1] = (127 - 20 << 4) | 5
    made, exact = numbers.fp4_as_fp8_bits(bits)
    assert not exact
    # 3 * 2^-20 under the scale 2^-6 is 3 * 2^-14: below half of e4m3's smallest value.
    assert np.all(made[1] & 0xFF == 0)


def test_fp4_as_fp8_leaves_nan_scales_out_of_the_tile() -> None:
    bits = np.full((2, 64), (120 << 4) | 3, np.uint16)
    bits[0, :32] = (255 << 4) | 3
    made, _ = numbers.fp4_as_fp8_bits(bits)
    assert np.all(made[0, :32] & 0xFF == 0x7F)
    assert np.all(made >> 8 == 114)
    only_nan, _ = numbers.fp4_as_fp8_bits(np.full((1, 32), 255 << 4, np.uint16))
    assert np.all(only_nan == 0xFF7F)


def test_nearest_e4m3_is_that_of_ml_dtypes() -> None:
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.standard_normal(5000) * 2.0 ** rng.integers(-12, 9, 5000), [0.0, -0.0, 448, -448, np.nan]])
    x = x[~(np.abs(x) > 448)]
    middle = (numbers.E4M3_POSITIVE[:-1] + numbers.E4M3_POSITIVE[1:]) / 2
    x = np.concatenate([x, middle, -middle])
    theirs = x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert np.array_equal(numbers.nearest_e4m3(x), np.where(np.isnan(x), 0x7F, theirs))


@pytest.mark.parametrize("encoding", ["q8_0", "mxfp4", "bf16", "f16"])
def test_the_reference_is_within_half_a_step_and_far_codes_are_not(encoding: str) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((8, 64))
    bits = numbers.bits_of(encoding, x)
    assert numbers.within_half_step(encoding, x, bits).all()
    broken = bits.copy()
    broken[2, 5] ^= {"q8_0": 0x20, "mxfp4": 4, "bf16": 0x10, "f16": 0x40}[encoding]
    within = numbers.within_half_step(encoding, x, broken)
    assert not within[2, 5]
    assert np.count_nonzero(~within) == 1
