"""FP8 and FP4 times their scales to F32, BF16 and F16: every code with every scale byte, and any shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4convert.formats.backend import Codecs, compiled_codecs, numpy_codecs
from dsv4convert.formats.base import Scratch, Tally
from dsv4convert.formats.e4m3 import e4m3_to_f32
from tests.oracles import plain_codecs as plain

ALL_BYTES = np.arange(256, dtype=np.uint8)
KINDS = ["f32", "bf16", "f16"]
FP8_BLOCKS = [(128, 128), (32, 32), (1, 32), (1, 256), (3, 40)]


def decode(codecs: Codecs, source: str, kind: str, codes, scale, block, scratch) -> tuple[np.ndarray, Tally]:
    columns = codes.shape[1] * (2 if source == "fp4" else 1)
    out = np.full((codes.shape[0], columns), 77, plain.STORAGE[kind])
    tally = Tally()
    getattr(codecs, f"{source}_to_{kind}")(codes, scale, block, out, scratch, tally)
    return plain.bits_of(out), tally


def expected(source: str, kind: str, codes, scale, block) -> tuple[np.ndarray, Tally]:
    values = plain.fp8_values(codes) if source == "fp8" else plain.fp4_values(codes)
    with np.errstate(all="ignore"):
        exact = values * plain.spread(scale, block, values.shape)
    return plain.store(exact, kind)


def check(codecs: Codecs, source: str, kind: str, codes, scale, block, scratch) -> None:
    bits, tally = decode(codecs, source, kind, codes, scale, block, scratch)
    want, count = expected(source, kind, codes, scale, block)
    np.testing.assert_array_equal(bits, want)
    assert tally == count


@pytest.mark.parametrize("kind", KINDS)
def test_every_e4m3_code_times_every_scale_byte(codecs: Codecs, scratch: Scratch, kind: str):
    weight = np.tile(ALL_BYTES, (256, 1))
    check(codecs, "fp8", kind, weight, ALL_BYTES.reshape(256, 1), (1, 256), scratch)


@pytest.mark.parametrize("kind", KINDS)
def test_every_e4m3_code_times_every_scale_byte_alone(codecs: Codecs, scratch: Scratch, kind: str):
    """One scale a tile, so that every shortcut for well-behaved tiles is taken where it may be."""
    numbers = np.delete(ALL_BYTES, [0x7F, 0xFF]).reshape(2, 127)
    for byte in range(256):
        check(codecs, "fp8", kind, numbers, np.array([[byte]], np.uint8), (128, 128), scratch)


@pytest.mark.parametrize("kind", KINDS)
def test_every_e4m3_code_times_every_scale_byte_written_as_f32(codecs: Codecs, scratch: Scratch, kind: str):
    weight = np.tile(ALL_BYTES, (256, 1))
    scale = plain.scale_values(ALL_BYTES).astype(np.float32).reshape(256, 1)
    check(codecs, "fp8", kind, weight, scale, (1, 256), scratch)


@pytest.mark.parametrize("kind", KINDS)
def test_every_packed_fp4_byte_times_every_scale_byte(codecs: Codecs, scratch: Scratch, kind: str):
    packed = np.tile(ALL_BYTES, (256, 1))
    scale = np.repeat(ALL_BYTES.reshape(256, 1), 16, axis=1)
    check(codecs, "fp4", kind, packed, scale, (1, 32), scratch)


@pytest.mark.parametrize("kind", KINDS)
def test_every_packed_fp4_byte_times_every_scale_byte_alone(codecs: Codecs, scratch: Scratch, kind: str):
    packed = ALL_BYTES.reshape(2, 128)
    for byte in range(256):
        check(codecs, "fp4", kind, packed, np.full((2, 8), byte, np.uint8), (1, 32), scratch)


@pytest.mark.parametrize("kind", KINDS)
def test_fp8_with_scales_that_are_no_powers_of_two_rounds_once(codecs: Codecs, scratch: Scratch, kind: str):
    rng = np.random.default_rng(5)
    weight = rng.integers(0, 256, (300, 256), dtype=np.uint8)
    scale = rng.integers(0, 1 << 32, (300, 8), dtype=np.uint32).view(np.float32)
    scale[:100] = rng.uniform(1e-6, 1e-3, (100, 8))
    scale[7] = [0, -0.0, np.inf, -np.inf, np.nan, -1.5, 1e-45, 3e38]
    check(codecs, "fp8", kind, weight, scale, (1, 32), scratch)


@pytest.mark.parametrize("kind", KINDS)
def test_fp4_with_scales_that_are_no_powers_of_two_rounds_once(codecs: Codecs, scratch: Scratch, kind: str):
    rng = np.random.default_rng(6)
    packed = rng.integers(0, 256, (100, 128), dtype=np.uint8)
    scale = rng.integers(0, 1 << 32, (100, 8), dtype=np.uint32).view(np.float32)
    scale[3] = [0, -0.0, np.inf, -np.inf, np.nan, -1.5, 1e-45, 3e38]
    check(codecs, "fp4", kind, packed, scale, (1, 32), scratch)


def test_rounding_to_bf16_goes_straight_from_the_exact_product(codecs: Codecs, scratch: Scratch):
    """A product above a bfloat16 midpoint by less than float32 can show must round up, not to even."""
    # 9/8 times k / 2^23 lies 2^-26 above 269 / 2^8, the midpoint of 134 / 2^7 and 135 / 2^7.
    k, remainder = divmod(269 * 2**18 + 1, 9)
    assert remainder == 0
    scale = np.array([[k * 2.0**-23]], np.float32)
    exact = np.array([1.125 * float(scale[0, 0])])
    assert plain.round_to_bf16(exact)[0] == 135 / 2**7
    assert plain.round_to_bf16(exact.astype(np.float32).astype(np.float64))[0] == 134 / 2**7
    bits, tally = decode(codecs, "fp8", "bf16", np.array([[0x39]], np.uint8), scale, (128, 128), scratch)
    assert bits[0, 0] == 0x3F80 + 135 - 128
    assert tally == Tally(changed=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", FP8_BLOCKS, ids=str)
def test_fp8_scales_reach_their_block_and_no_other(codecs: Codecs, scratch: Scratch, kind: str, block):
    rng = np.random.default_rng(7)
    rows, columns = 2 * block[0] + 1, 2 * block[1] + 17
    weight = rng.integers(0, 0x7F, (rows, columns), dtype=np.uint8)
    scale = rng.integers(100, 140, (3, 3), dtype=np.uint8)
    check(codecs, "fp8", kind, weight, scale, block, scratch)


def test_fp8_to_bf16_is_torchs_cast_times_scale(codecs: Codecs, scratch: Scratch):
    """Where nothing is out of range the product of bfloat16 numbers is exact in torch as well."""
    weight = np.tile(np.delete(ALL_BYTES, [0x7F, 0xFF]), (200, 1))
    scale = np.arange(10, 210, dtype=np.uint8).reshape(200, 1)
    wide = torch.from_numpy(weight).view(torch.float8_e4m3fn).to(torch.bfloat16)
    theirs = wide * torch.from_numpy(scale).view(torch.float8_e8m0fnu).to(torch.bfloat16)
    bits, tally = decode(codecs, "fp8", "bf16", weight, scale, (1, 254), scratch)
    np.testing.assert_array_equal(bits, theirs.view(torch.uint16).numpy())
    assert tally == Tally()


@st.composite
def tiles(draw: st.DrawFn, source: str):
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 90))
    block = (draw(st.integers(1, 41)), draw(st.integers(1, 91)))
    if draw(st.booleans()):
        block = draw(st.sampled_from([(1, 32), (32, 32), (16, 64), (128, 128)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    if source == "fp4":
        columns = 2 * columns
        codes = rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
    else:
        codes = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
        if draw(st.booleans()):
            codes[(codes & 0x7F) == 0x7F] = 1
    shape = (-(-rows // block[0]), -(-columns // block[1]))
    low, high = draw(st.sampled_from([(0, 256), (110, 130), (0, 5), (245, 256), (112, 135)]))
    scale = rng.integers(low, high, shape, dtype=np.uint8)
    if draw(st.booleans()):
        scale = plain.scale_values(scale).astype(np.float32)
        if draw(st.booleans()):
            scale = (scale * np.float32(1.1)).astype(np.float32)
    return codes, scale, block


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["fp8", "fp4"])
@settings(max_examples=150)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_any_shape_any_block_any_scale(source: str, kind: str, data: st.DataObject):
    codes, scale, block = data.draw(tiles(source))
    for codecs in (numpy_codecs(), compiled_codecs()):
        check(codecs, source, kind, codes, scale, block, _SHARED_SCRATCH)


_SHARED_SCRATCH = Scratch()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["fp8", "fp4"])
@pytest.mark.parametrize("shape", [(0, 64), (3, 0)], ids=str)
def test_an_empty_tile_is_no_error(codecs: Codecs, scratch: Scratch, source: str, kind: str, shape):
    rows, columns = shape
    codes = np.zeros((rows, columns // (2 if source == "fp4" else 1)), np.uint8)
    scale = np.zeros((rows, -(-columns // 32)), np.uint8)
    assert decode(codecs, source, kind, codes, scale, (1, 32), scratch)[1] == Tally()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["fp8", "fp4"])
def test_scales_of_another_shape_are_refused(codecs: Codecs, scratch: Scratch, source: str, kind: str):
    codes = np.ones((64, 64), np.uint8)
    for shape in [(64, 1), (1, 2), (2, 3), (2, 1)]:
        if source == "fp8" and shape == (2, 2):
            continue
        with pytest.raises(ValueError, match="scale"):
            decode(codecs, source, kind, codes, np.ones(shape, np.uint8), (32, 32), scratch)


def test_read_only_and_unaligned_input_decodes_alike(codecs: Codecs, scratch: Scratch):
    """Mapped files are read-only, and a tensor may start at any byte."""
    rng = np.random.default_rng(8)
    memory = rng.integers(0, 256, 1 + 64 * 64, dtype=np.uint8)
    odd = memory[1:].reshape(64, 64)
    odd[(odd & 0x7F) == 0x7F] = 3
    odd.flags.writeable = False
    scale = np.full((64, 4), 120, np.uint8)
    scale.flags.writeable = False
    check(codecs, "fp4", "bf16", odd, scale, (1, 32), scratch)
    check(codecs, "fp8", "bf16", odd, scale[:, :2].copy(), (1, 32), scratch)
    check(codecs, "fp8", "f32", odd, scale[:, :2].copy(), (1, 32), scratch)


def test_minus_zero_keeps_its_sign(codecs: Codecs, scratch: Scratch):
    bits, _ = decode(
        codecs, "fp8", "bf16", np.full((1, 32), 0x80, np.uint8), np.array([[3]], np.uint8), (1, 32), scratch
    )
    np.testing.assert_array_equal(bits, 0x8000)
    bits, _ = decode(
        codecs, "fp4", "bf16", np.full((1, 16), 0x88, np.uint8), np.array([[3]], np.uint8), (1, 32), scratch
    )
    np.testing.assert_array_equal(bits, 0x8000)


def test_nan_is_positive_and_quiet_whatever_the_code(codecs: Codecs, scratch: Scratch):
    weight = np.array([[0x7F, 0xFF, 0x80, 0x01]], np.uint8)
    for kind, nan in plain.NAN_BITS.items():
        bits, tally = decode(codecs, "fp8", kind, weight, np.array([[127]], np.uint8), (1, 4), scratch)
        np.testing.assert_array_equal(bits[0, :2], nan)
        assert tally.nan == 2
        bits, tally = decode(codecs, "fp8", kind, weight, np.array([[255]], np.uint8), (1, 4), scratch)
        np.testing.assert_array_equal(bits, nan)
        assert tally == Tally(nan=4)


def test_codes_decode_as_the_table_says():
    np.testing.assert_array_equal(plain.fp8_values(ALL_BYTES), e4m3_to_f32(ALL_BYTES).astype(np.float64))
