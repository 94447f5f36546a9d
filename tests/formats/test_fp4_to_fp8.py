"""FP4 re-encoded as FP8: lossless while scales lie close, counted where not, right for every scale and code."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4convert.formats.backend import Codecs, compiled_codecs, numpy_codecs
from dsv4convert.formats.base import Scratch, Tally
from tests.oracles import plain_codecs as plain


def convert(codecs: Codecs, packed, scale, scratch: Scratch, side: int = 128) -> tuple[np.ndarray, np.ndarray, Tally]:
    rows, columns = packed.shape[0], packed.shape[1] * 2
    out = np.full((rows, columns), 0xAA, np.uint8)
    out_scale = np.full((-(-rows // side), -(-columns // side)), 0xAA, np.uint8)
    tally = Tally()
    codecs.fp4_to_fp8(packed, scale, out, out_scale, scratch, tally, side)
    alone = np.empty_like(out_scale)
    codecs.fp4_to_fp8_scales(scale, alone, scratch, Tally(), side)
    np.testing.assert_array_equal(alone, out_scale)
    return out, out_scale, tally


def expected(packed: np.ndarray, scale: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray, Tally]:
    """Tile by tile, in float64; ml_dtypes rounds to e4m3."""
    rows, columns = packed.shape[0], packed.shape[1] * 2
    value = plain.fp4_values(packed)
    out = np.empty((rows, columns), np.uint8)
    out_scale = np.empty((-(-rows // side), -(-columns // side)), np.uint8)
    tally = Tally()
    for r in range(out_scale.shape[0]):
        for c in range(out_scale.shape[1]):
            part = np.s_[r * side : (r + 1) * side, c * side : (c + 1) * side]
            groups = side // 32
            bytes_ = scale[r * side : (r + 1) * side, c * groups : (c + 1) * groups].astype(int)
            real = bytes_[bytes_ != 255]
            tile = max(int(real.max()) - 6, 0) if real.size else 255
            out_scale[r, c] = tile
            ratio = np.where(bytes_ == 255, np.nan, np.exp2(bytes_ - tile * 1.0))
            exact = value[part] * np.repeat(ratio, 32, axis=1)[:, : value[part].shape[1]]
            with np.errstate(invalid="ignore"):
                codes = exact.astype(ml_dtypes.float8_e4m3fn)
            nan = np.isnan(exact)
            out[part] = np.where(nan, 0x7F, codes.view(np.uint8))
            tally.nan += int(nan.sum())
            tally.changed += int(((codes.astype(np.float64) != exact) & ~nan).sum())
    return out, out_scale, tally


def check(codecs: Codecs, packed, scale, scratch: Scratch, side: int = 128) -> Tally:
    out, out_scale, tally = convert(codecs, packed, scale, scratch, side)
    want, want_scale, count = expected(packed, scale, side)
    np.testing.assert_array_equal(out_scale, want_scale)
    np.testing.assert_array_equal(out, want)
    assert tally == count
    return tally


@pytest.mark.parametrize("side", [128, 32])
@pytest.mark.parametrize("largest", [0, 1, 5, 6, 7, 20, 127, 200, 254])
def test_every_packed_byte_with_every_scale_below_the_largest(
    codecs: Codecs, scratch: Scratch, largest: int, side: int
):
    packed = np.tile(np.arange(256, dtype=np.uint8), (largest + 1, 1))
    scale = np.repeat(np.arange(largest + 1, dtype=np.uint8)[:, None], 16, axis=1)
    scale[::side] = largest  # one group of each tile is enough
    check(codecs, packed, np.ascontiguousarray(scale), scratch, side)


@pytest.mark.parametrize(("spread", "lossless"), [(0, True), (14, True), (15, False)])
def test_scales_may_spread_by_two_to_the_fourteen(codecs: Codecs, scratch: Scratch, spread: int, lossless: bool):
    packed = np.tile(np.arange(256, dtype=np.uint8), (128, 1))
    scale = np.full((128, 16), 120, np.uint8)
    scale[::2] -= np.uint8(spread)
    tally = check(codecs, packed, scale, scratch)
    assert tally.lossless == lossless
    values = np.empty((128, 512), np.float32)
    again = np.empty((128, 512), np.float32)
    out, out_scale, _ = convert(codecs, packed, scale, scratch)
    codecs.fp4_to_f32(packed, scale, (1, 32), values, scratch, Tally())
    codecs.fp8_to_f32(out, out_scale, (128, 128), again, scratch, Tally())
    assert np.array_equal(plain.bits_of(values), plain.bits_of(again)) == lossless


def test_nan_scales_make_nan_codes_and_stay_out_of_the_tiles_scale(codecs: Codecs, scratch: Scratch):
    rng = np.random.default_rng(31)
    packed = rng.integers(0, 256, (130, 128), dtype=np.uint8)
    scale = rng.integers(110, 120, (130, 8), dtype=np.uint8)
    scale[3, 1] = scale[129, 5] = 255
    scale[128:, :4] = 255
    tally = check(codecs, packed, scale, scratch)
    assert tally == Tally(nan=32 * 10)


@settings(max_examples=80)
@given(
    st.integers(1, 300),
    st.integers(1, 12),
    st.sampled_from([(100, 115), (0, 256), (0, 9), (90, 110)]),
    st.sampled_from([128, 32]),
    st.integers(0),
)
def test_any_number_of_rows_and_groups(rows: int, groups: int, span: tuple[int, int], side: int, seed: int):
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (rows, groups * 16), dtype=np.uint8)
    scale = rng.integers(*span, (rows, groups), dtype=np.uint8)
    for codecs in (numpy_codecs(), compiled_codecs()):
        check(codecs, packed, scale, _SCRATCH, side)


@pytest.mark.parametrize("half", [1, 17, 50])
def test_rows_that_are_no_whole_group(codecs: Codecs, scratch: Scratch, half: int):
    rng = np.random.default_rng(32)
    packed = rng.integers(0, 256, (5, half), dtype=np.uint8)
    check(codecs, packed, rng.integers(100, 110, (5, -(-half // 16)), dtype=np.uint8), scratch)


_SCRATCH = Scratch()


def test_scales_of_another_shape_are_refused(codecs: Codecs, scratch: Scratch):
    packed, out = np.ones((4, 32), np.uint8), np.empty((4, 64), np.uint8)
    with pytest.raises(ValueError, match="scale"):
        codecs.fp4_to_fp8(packed, np.ones((4, 1), np.uint8), out, np.empty((1, 1), np.uint8), scratch, Tally())
    with pytest.raises(ValueError, match="scale"):
        codecs.fp4_to_fp8(packed, np.ones((4, 2), np.uint8), out, np.empty((2, 1), np.uint8), scratch, Tally())
