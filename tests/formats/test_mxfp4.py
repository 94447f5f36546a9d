"""MXFP4: the rearrangement of packed FP4 bit for bit, the quantiser that undoes a dequantisation, the reader."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4convert.formats import e2m1
from dsv4convert.formats.backend import Codecs, compiled_codecs, numpy_codecs
from dsv4convert.formats.base import Scratch, Tally
from tests.oracles import plain_codecs as plain

ALL_BYTES = np.arange(256, dtype=np.uint8)


def repack(codecs: Codecs, packed: np.ndarray, scale: np.ndarray, scratch: Scratch) -> tuple[np.ndarray, Tally]:
    out = np.full((packed.shape[0], scale.shape[1] * 17), 0xAA, np.uint8)
    tally = Tally()
    codecs.fp4_to_mxfp4(packed, scale, out, scratch, tally)
    return out, tally


def quantise(codecs: Codecs, values: np.ndarray, scratch: Scratch) -> tuple[np.ndarray, Tally]:
    out = np.full((values.shape[0], values.shape[1] // 32 * 17), 0xAA, np.uint8)
    tally = Tally()
    codecs.f32_to_mxfp4(values, out, scratch, tally)
    return out, tally


def fp4_values(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    out = np.empty((packed.shape[0], packed.shape[1] * 2), np.float32)
    e2m1.fp4_to_f32(packed, scale, (1, 32), out, Scratch(), Tally())
    return out


def test_every_packed_byte_at_every_place_with_every_scale_byte(codecs: Codecs, scratch: Scratch):
    # Row r holds scale byte r; the packed bytes are rotated so that each value visits each place.
    packed = (ALL_BYTES[None, :] + ALL_BYTES[:, None]).astype(np.uint8)
    scale = np.repeat(ALL_BYTES[:, None], 16, axis=1)
    out, tally = repack(codecs, packed, scale, scratch)
    np.testing.assert_array_equal(out, plain.mxfp4_blocks(packed, scale))
    assert tally == Tally(nan=16 * 32)


def test_the_block_layout_is_the_documented_one(codecs: Codecs, scratch: Scratch):
    codes = np.arange(32) % 16
    codes[16:] = 15 - codes[:16]
    packed = (codes[0::2] | codes[1::2] << 4).astype(np.uint8).reshape(1, 16)
    out, _ = repack(codecs, packed, np.array([[0x7B]], np.uint8), scratch)
    assert out.tobytes().hex() == "7b" + "".join(f"{15 - j:x}{j:x}" for j in range(16))


@settings(max_examples=100)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(0, 2**32))
def test_any_number_of_rows_and_groups(rows: int, groups: int, seed: int):
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (rows, groups * 16), dtype=np.uint8)
    scale = rng.integers(0, 255, (rows, groups), dtype=np.uint8)
    for codecs in (numpy_codecs(), compiled_codecs()):
        out, tally = repack(codecs, packed, scale, _SCRATCH)
        np.testing.assert_array_equal(out, plain.mxfp4_blocks(packed, scale))
        assert tally == Tally()


_SCRATCH = Scratch()


def test_gguf_py_reads_the_same_numbers_but_for_nan(codecs: Codecs, scratch: Scratch):
    packed = np.tile(ALL_BYTES, (255, 1))
    scale = np.repeat(ALL_BYTES[:255, None], 16, axis=1)
    out, _ = repack(codecs, packed, scale, scratch)
    with np.errstate(over="ignore"):
        theirs = gguf.quants.dequantize(out, gguf.GGMLQuantizationType.MXFP4)
    ours = np.empty((255, 512), np.float32)
    tally = Tally()
    codecs.mxfp4_to_f32(out, ours, scratch, tally)
    np.testing.assert_array_equal(ours, theirs)  # 0.0 == -0.0, the other known disagreement
    np.testing.assert_array_equal(plain.bits_of(ours), plain.bits_of(fp4_values(packed, scale)))
    assert tally.overflow == int(np.isinf(ours).sum()) > 0


def test_reader_gives_nan_for_the_nan_scale(codecs: Codecs, scratch: Scratch):
    out, _ = repack(codecs, np.full((1, 16), 0x32, np.uint8), np.array([[255]], np.uint8), scratch)
    ours = np.empty((1, 32), np.float32)
    tally = Tally()
    codecs.mxfp4_to_f32(out, ours, scratch, tally)
    np.testing.assert_array_equal(plain.bits_of(ours), 0x7FC00000)
    assert tally == Tally(nan=32)


def published_blocks(rng: np.random.Generator, rows: int, spread: float = 6.0) -> tuple[np.ndarray, np.ndarray]:
    x = rng.standard_normal((rows, 64)) * np.exp2(rng.uniform(-spread, spread, (rows, 1)))
    return e2m1.quantise_fp4((x * 0.02).astype(np.float32))


def is_ambiguous(packed: np.ndarray) -> np.ndarray:
    """Blocks whose values a second scale can hold as well: a 6 and nothing that half of the codes lacks."""
    magnitude = (e2m1.unpack_e2m1(packed) & 7).reshape(packed.shape[0], -1, 32)
    return (magnitude.max(axis=2) == 7) & ~np.isin(magnitude, [1, 3]).any(axis=2)


def test_published_blocks_come_back_to_their_codes_and_scales(codecs: Codecs, scratch: Scratch):
    packed, scale = published_blocks(np.random.default_rng(11), 4000)
    out, tally = quantise(codecs, fp4_values(packed, scale), scratch)
    want = plain.mxfp4_blocks(packed, scale)
    same = (out.reshape(-1, 17) == want.reshape(-1, 17)).all(axis=1).reshape(scale.shape)
    np.testing.assert_array_equal(same, ~is_ambiguous(packed))
    assert tally == Tally()
    largest = (e2m1.unpack_e2m1(packed) & 7).reshape(4000, 2, 32).max(axis=2)
    # All three kinds of blocks were there, those with 3 as the largest code included.
    assert {int(code) for code in np.unique(largest)} == {5, 6, 7}
    assert same[largest == 5].all()


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_any_fp4_values_come_back_unchanged(codecs: Codecs, scratch: Scratch, kind: str):
    rng = np.random.default_rng(12)
    packed = rng.integers(0, 256, (2000, 32), dtype=np.uint8)
    packed[::3] &= 0x33  # small codes only
    packed[::7] = 0
    packed[5] = 0x80
    scale = rng.integers(0, 253, (2000, 2), dtype=np.uint8)
    scale[:20] = np.arange(40).reshape(20, 2) // 4
    values = fp4_values(packed, scale)
    tally = Tally()
    out = np.empty((2000, 34), np.uint8)
    if kind == "f32":
        codecs.f32_to_mxfp4(values, out, scratch, tally)
    else:
        codecs.bf16_to_mxfp4((values.view(np.uint32) >> 16).astype(np.uint16), out, scratch, tally)
    back = np.empty_like(values)
    codecs.mxfp4_to_f32(out, back, scratch, Tally())
    np.testing.assert_array_equal(plain.bits_of(back), plain.bits_of(values))
    assert tally == Tally()


def test_an_ambiguous_block_gets_the_larger_scale(codecs: Codecs, scratch: Scratch):
    values = np.tile(np.array([6, -4, 3, 2, -1, 0, -0.0, 1], np.float32), 4).reshape(1, 32)
    out, _ = quantise(codecs, values, scratch)
    assert out[0, 0] == 128
    values[0, 0] = 0.5  # which the larger scale lacks
    out, _ = quantise(codecs, values, scratch)
    assert out[0, 0] == 127


def test_zeros_get_the_smallest_published_scale_and_keep_their_signs(codecs: Codecs, scratch: Scratch):
    values = np.where(np.arange(32) % 3, 0.0, -0.0).astype(np.float32).reshape(1, 32)
    out, tally = quantise(codecs, values, scratch)
    assert out[0, 0] == 1
    back = np.empty_like(values)
    codecs.mxfp4_to_f32(out, back, scratch, Tally())
    np.testing.assert_array_equal(plain.bits_of(back), plain.bits_of(values))
    assert tally == Tally()


def test_rounding_takes_the_nearest_value_of_the_smallest_scale_that_fits(codecs: Codecs, scratch: Scratch):
    rng = np.random.default_rng(13)
    values = (rng.standard_normal((500, 64)) * np.exp2(rng.uniform(-90, 90, (500, 1)))).astype(np.float32)
    out, tally = quantise(codecs, values, scratch)
    power = 2.0 ** (out.reshape(500, 2, 17)[:, :, :1].astype(np.float64) - 127)
    groups = values.reshape(500, 2, 32).astype(np.float64)
    amax = np.abs(groups).max(axis=2, keepdims=True)
    assert (amax <= 6 * power).all()
    assert (amax > 3 * power).all()
    back = np.empty_like(values)
    codecs.mxfp4_to_f32(out, back, scratch, Tally())
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    distance = np.abs(np.abs(groups / power)[..., None] - grid).min(axis=-1)
    np.testing.assert_array_equal(np.abs(groups - back.reshape(groups.shape)) / power, distance)
    assert tally == Tally(changed=int((back != values).sum()))


def test_ties_go_to_the_even_code(codecs: Codecs, scratch: Scratch):
    values = np.zeros((1, 32), np.float32)
    values[0, :8] = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]
    values[0, 8:16] = -values[0, :8]
    back = np.empty_like(values)
    out, tally = quantise(codecs, values, scratch)
    codecs.mxfp4_to_f32(out, back, scratch, Tally())
    np.testing.assert_array_equal(back[0, :8], [6, 0, 1, 1, 2, 2, 4, 4])
    np.testing.assert_array_equal(back[0, 8:16], [-6, 0, -1, -1, -2, -2, -4, -4])
    assert tally == Tally(changed=14)


def test_a_nan_takes_its_block_with_it_and_all_is_counted(codecs: Codecs, scratch: Scratch):
    values = np.ones((2, 64), np.float32)
    values[1, 40] = np.nan
    out, tally = quantise(codecs, values, scratch)
    np.testing.assert_array_equal(out.reshape(4, 17)[:, 0] == 255, [False, False, False, True])
    assert tally == Tally(nan=1, changed=31)


def test_an_infinity_becomes_six_and_is_counted(codecs: Codecs, scratch: Scratch):
    values = np.zeros((1, 32), np.float32)
    values[0, 3], values[0, 4] = np.inf, -np.inf
    out, tally = quantise(codecs, values, scratch)
    np.testing.assert_array_equal(out[0, 4:6] & 7, 7)
    assert tally == Tally(overflow=2)


def test_values_far_below_their_block_are_counted_as_changed(codecs: Codecs, scratch: Scratch):
    """Their quotient by the scale underflows to zero, which must not look exact."""
    values = np.zeros((1, 32), np.float32)
    values[0, :3] = [6 * 2.0**100, 2.0**-60, -(2.0**-149)]
    assert quantise(codecs, values, scratch)[1] == Tally(changed=2)


@pytest.mark.parametrize("columns", [1, 33, 48])
def test_a_row_that_is_no_whole_group_is_refused(codecs: Codecs, scratch: Scratch, columns: int):
    with pytest.raises(ValueError, match="MXFP4"):
        codecs.f32_to_mxfp4(np.ones((2, columns), np.float32), np.empty((2, 17), np.uint8), scratch, Tally())


def test_scales_of_another_shape_are_refused(codecs: Codecs, scratch: Scratch):
    packed = np.ones((4, 32), np.uint8)
    for shape in [(4, 1), (2, 2), (4, 3)]:
        with pytest.raises(ValueError, match="scale"):
            codecs.fp4_to_mxfp4(packed, np.ones(shape, np.uint8), np.empty((4, 34), np.uint8), scratch, Tally())
    with pytest.raises(ValueError, match="output"):
        codecs.fp4_to_mxfp4(packed, np.ones((4, 2), np.uint8), np.empty((4, 33), np.uint8), scratch, Tally())


def test_an_empty_tile_is_no_error(codecs: Codecs, scratch: Scratch):
    assert repack(codecs, np.zeros((0, 16), np.uint8), np.zeros((0, 1), np.uint8), scratch)[1] == Tally()
    assert quantise(codecs, np.zeros((0, 32), np.float32), scratch)[1] == Tally()
