"""Q8_0 against gguf-py, llama.cpp's C and the plain formula; the table of pairs; what is counted."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4convert.formats import q8_0
from dsv4convert.formats.backend import Codecs, compiled_codecs, numpy_codecs
from dsv4convert.formats.base import Scratch, Tally
from tests.oracles import plain_codecs as plain

ALL_BYTES = np.arange(256, dtype=np.uint8)
NUMBERS = np.delete(ALL_BYTES, [0x7F, 0xFF])
# Below this 1/d overflows, and llama.cpp converts infinity to int8.
SMALLEST_DEFINED_AMAX = 2.0**-120


def quantise(codecs: Codecs, name: str, *args, shape: tuple[int, int], scratch: Scratch) -> tuple[np.ndarray, Tally]:
    out = np.full((shape[0], shape[1] // 32 * 34), 0xAA, np.uint8)
    tally = Tally()
    getattr(codecs, name)(*args, out, scratch, tally)
    return out, tally


def decoded(codes: np.ndarray, scale: np.ndarray, block: tuple[int, int], source: str = "fp8") -> np.ndarray:
    values = plain.fp8_values(codes) if source == "fp8" else plain.fp4_values(codes)
    with np.errstate(all="ignore"):
        return (values * plain.spread(scale, block, values.shape)).astype(np.float32)


def plain_rows(x: np.ndarray) -> np.ndarray:
    return plain.q8_0_blocks(x.reshape(-1, 32)).reshape(x.shape[0], -1)


def gguf_rows(x: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0)


def pair_blocks() -> np.ndarray:
    """Codes [128 * 256, 32]: for each pair of a largest magnitude and a code not above it, one block."""
    blocks = np.zeros((128, 256, 32), np.uint8)
    blocks[:, :, 0] = np.arange(128)[:, None]
    code = np.broadcast_to(ALL_BYTES, (128, 256))
    inside = (code & 0x7F) <= np.arange(128)[:, None]
    blocks[:, :, 17] = np.where(inside, code, 0)
    return blocks.reshape(-1, 32)


@pytest.mark.parametrize("byte", [0, 1, 16, 17, 18, 100, 127, 142, 244, 245, 246, 254, 255])
def test_every_pair_of_largest_magnitude_and_code_follows_the_plain_formula(
    codecs: Codecs, scratch: Scratch, byte: int
):
    weight = pair_blocks()
    scale = np.full((weight.shape[0], 1), byte, np.uint8)
    out, _ = quantise(codecs, "fp8_to_q8_0", weight, scale, (1, 32), shape=weight.shape, scratch=scratch)
    np.testing.assert_array_equal(out, plain_rows(decoded(weight, scale, (1, 32))))


def test_every_pair_without_nan_in_one_tile(codecs: Codecs, scratch: Scratch):
    """No NaN among the codes, so that the quick path of the compiled twin is the one that is tried."""
    weight = pair_blocks()
    weight = weight[((weight & 0x7F) != 0x7F).all(axis=1)]
    for byte in (115, 120, 140):
        scale = np.array([[byte]], np.uint8)
        block = (weight.shape[0], 32)
        out, _ = quantise(codecs, "fp8_to_q8_0", weight, scale, block, shape=weight.shape, scratch=scratch)
        np.testing.assert_array_equal(out, gguf_rows(decoded(weight, scale, block)))


def test_the_table_is_the_plain_formula_for_every_pair():
    table = q8_0.q8_0_table()
    blocks = pair_blocks()
    q = plain.q8_0_blocks(plain.fp8_values(blocks).astype(np.float32))[:, 2 + 17].view(np.int8).reshape(128, 256)
    inside = (ALL_BYTES & 0x7F)[None, :] <= np.arange(128)[:, None]
    np.testing.assert_array_equal(table[inside], q[inside])


def test_the_multipliers_give_the_table_for_every_pair():
    table, multiplier = q8_0.q8_0_table(), q8_0.multipliers()
    value = plain.fp8_values(ALL_BYTES.reshape(1, -1))[0].astype(np.float32)
    for largest in range(127):
        inside = largest >= (ALL_BYTES & 0x7F)
        product = value[inside] * multiplier[largest]
        np.testing.assert_array_equal(np.rint(product), table[largest, inside])
        # The compiled twin adds a half and truncates.
        np.testing.assert_array_equal(np.trunc(np.abs(product) + np.float32(0.5)), np.abs(table[largest, inside]))


@pytest.mark.parametrize("block", [(1, 32), (32, 32), (128, 128), (1, 96), (7, 64)], ids=str)
def test_every_scale_byte_with_every_largest_magnitude(codecs: Codecs, scratch: Scratch, block: tuple[int, int]):
    rng = np.random.default_rng(21)
    rows, columns = 256 * block[0], 2 * block[1]
    if block[0] > 1:
        rows = 8 * block[0] + 1
    for first in range(0, 256, 8 if block[0] > 1 else 256):
        weight = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
        weight[(weight & 0x7F) == 0x7F] = 0x7E
        weight &= (0x80 | rng.integers(0, 128, (rows, columns // 32), dtype=np.uint8)).repeat(32, axis=1)
        down = -(-rows // block[0])
        scale = ((first + np.arange(down)) % 256).astype(np.uint8)[:, None].repeat(2, axis=1)
        scale = np.ascontiguousarray(scale)
        out, _ = quantise(codecs, "fp8_to_q8_0", weight, scale, block, shape=weight.shape, scratch=scratch)
        np.testing.assert_array_equal(out, plain_rows(decoded(weight, scale, block)))


def test_fp4_every_packed_byte_with_every_scale_byte(codecs: Codecs, scratch: Scratch):
    rng = np.random.default_rng(22)
    packed = rng.integers(0, 256, (256 * 8, 64), dtype=np.uint8)
    masks = np.array([0x99, 0xAA, 0xBB, 0xCC, 0xDD, 0xEE, 0xFF, 0x88], np.uint8)
    packed &= np.tile(masks, 256)[:, None]
    scale = np.repeat(ALL_BYTES, 8)[:, None].repeat(4, axis=1)
    shape = (packed.shape[0], 128)
    want = plain_rows(decoded(packed, scale, (1, 32), "fp4"))
    out, _ = quantise(codecs, "fp4_to_q8_0", packed, scale, (1, 32), shape=shape, scratch=scratch)
    np.testing.assert_array_equal(out, want)
    for start in range(0, shape[0], 8):
        part = np.s_[start : start + 8]
        out, _ = quantise(codecs, "fp4_to_q8_0", packed[part], scale[part], (1, 32), shape=(8, 128), scratch=scratch)
        np.testing.assert_array_equal(out, want[part])


def many_floats() -> np.ndarray:
    rng = np.random.default_rng(23)
    normal = rng.standard_normal((3000, 64)) * np.exp2(rng.uniform(-118, 120, (3000, 1)))
    grid = rng.integers(-254, 255, (3000, 64)) / 2.0  # many exact halves, where rounding rules differ
    bits = rng.integers(0, 1 << 32, (3000, 64), dtype=np.uint32).view(np.float32)
    bits = np.where(np.isfinite(bits), bits, 1)
    weights = rng.standard_normal((3000, 64)) * 0.02
    sparse = np.where(rng.random((3000, 64)) < 0.05, weights, 0)
    every = np.concatenate([normal, grid, bits, weights, sparse]).astype(np.float32)
    extremes = np.zeros((9, 64), np.float32)
    extremes[1] = np.finfo(np.float32).max
    extremes[2, 0] = -np.finfo(np.float32).max
    extremes[3] = 65504 * 127
    extremes[4] = np.nextafter(np.float32(65520 * 127), np.float32(0))
    extremes[5] = 65520 * 127
    extremes[6, ::2] = 2.0**-24 * 127 / 2
    extremes[7, 5] = 2.0**-14 * 127
    extremes[8] = -0.0
    return np.concatenate([every, extremes])


def defined(x: np.ndarray) -> np.ndarray:
    """Blocks where llama.cpp's arithmetic is defined."""
    amax = np.abs(x.reshape(-1, 32)).max(axis=1)
    return (amax == 0) | (amax > SMALLEST_DEFINED_AMAX)


def test_floats_equal_gguf_py_bit_for_bit(codecs: Codecs, scratch: Scratch):
    x = many_floats()
    out, _ = quantise(codecs, "f32_to_q8_0", x, shape=x.shape, scratch=scratch)
    keep = defined(x)
    np.testing.assert_array_equal(out.reshape(-1, 34)[keep], gguf_rows(x).reshape(-1, 34)[keep])
    np.testing.assert_array_equal(out, plain_rows(x))


def test_one_extreme_at_a_time_equals_the_plain_formula(codecs: Codecs, scratch: Scratch):
    """Alone, so that an ordinary neighbour does not take the quick path for it or away from it."""
    extremes = [0.0, -0.0, 1e-45, 1e-38, 2.0**-120, 2.0**-18, 1e-6, 3.8e-6, 1e-3, 8.3e6, 8.4e6, 3e38]
    for value in [*extremes, np.inf, -np.inf, np.nan]:
        for others in (0.0, 1e-3):
            x = np.full((1, 32), others, np.float32)
            x[0, 9] = value
            out, tally = quantise(codecs, "f32_to_q8_0", x, shape=x.shape, scratch=scratch)
            np.testing.assert_array_equal(out, plain_rows(x), err_msg=f"{value} among {others}")
            assert tally.nan == int(np.isnan(value))


def test_bfloat16_quantises_as_its_float(codecs: Codecs, scratch: Scratch):
    x = many_floats()
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    out, _ = quantise(codecs, "bf16_to_q8_0", bits, shape=x.shape, scratch=scratch)
    np.testing.assert_array_equal(out, plain_rows((bits.astype(np.uint32) << 16).view(np.float32)))


@pytest.mark.llama
def test_floats_equal_llama_cpps_c_bit_for_bit(codecs: Codecs, scratch: Scratch):
    llama_cpp = pytest.importorskip("llama_cpp")
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    x = many_floats()
    blocks = np.ascontiguousarray(x.reshape(-1, 32)[defined(x)])
    theirs = np.zeros((blocks.shape[0], 34), np.uint8)
    quantize = library.quantize_row_q8_0_ref
    quantize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    quantize.restype = None
    quantize(blocks.ctypes.data, theirs.ctypes.data, blocks.size)
    out, _ = quantise(codecs, "f32_to_q8_0", blocks, shape=blocks.shape, scratch=scratch)
    np.testing.assert_array_equal(out, theirs)


@settings(max_examples=100)
@given(st.data())
def test_any_shape_any_block_any_scale(data: st.DataObject):
    rows, groups = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 9))
    block = data.draw(st.sampled_from([(1, 32), (32, 32), (128, 128), (3, 64), (5, 48), (40, 7), (1, 288)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    weight = rng.integers(0, 256, (rows, groups * 32), dtype=np.uint8)
    if data.draw(st.booleans()):
        weight[(weight & 0x7F) == 0x7F] = 0
    shape = (-(-rows // block[0]), -(-groups * 32 // block[1]))
    low, high = data.draw(st.sampled_from([(0, 256), (108, 122), (10, 25), (235, 250)]))
    scale = rng.integers(low, high, shape, dtype=np.uint8)
    kind = data.draw(st.sampled_from(["e8m0", "power of two", "float"]))
    if kind != "e8m0":
        scale = plain.scale_values(scale).astype(np.float32)
    if kind == "float":
        scale = (scale * np.float32(0.7)).astype(np.float32)
    want = plain_rows(decoded(weight, scale, block))
    for codecs in (numpy_codecs(), compiled_codecs()):
        out, tally = quantise(codecs, "fp8_to_q8_0", weight, scale, block, shape=weight.shape, scratch=_SCRATCH)
        np.testing.assert_array_equal(out, want)
        with np.errstate(all="ignore"):
            assert tally.nan == int(np.isnan(decoded(weight, scale, block)).sum())


_SCRATCH = Scratch()


def test_blocks_whose_d_leaves_float16_are_counted(codecs: Codecs, scratch: Scratch):
    weight = np.zeros((4, 32), np.uint8)
    weight[:, :5] = 0x7E
    scale = np.array([[127], [160], [100], [110]], np.uint8)
    _, tally = quantise(codecs, "fp8_to_q8_0", weight, scale, (1, 32), shape=weight.shape, scratch=scratch)
    assert tally == Tally(overflow=5, underflow=5)
    x = decoded(weight, scale, (1, 32))
    _, tally = quantise(codecs, "f32_to_q8_0", x, shape=x.shape, scratch=scratch)
    assert tally == Tally(overflow=5, underflow=5)
    packed = np.zeros((3, 16), np.uint8)
    packed[:, :5] = 0x77
    _, tally = quantise(
        codecs,
        "fp4_to_q8_0",
        packed,
        np.array([[127], [160], [100]], np.uint8),
        (1, 32),
        shape=(3, 32),
        scratch=scratch,
    )
    assert tally == Tally(overflow=10, underflow=10)


def test_a_nan_makes_d_nan_and_every_level_zero(codecs: Codecs, scratch: Scratch):
    weight = np.full((1, 32), 0x40, np.uint8)
    weight[0, 30] = 0xFF
    out, tally = quantise(
        codecs, "fp8_to_q8_0", weight, np.array([[120]], np.uint8), (1, 32), shape=(1, 32), scratch=scratch
    )
    assert out.tobytes() == bytes([0x00, 0x7E]) + bytes(32)
    assert tally == Tally(nan=1)
    np.testing.assert_array_equal(out, gguf_rows(decoded(weight, np.array([[120]], np.uint8), (1, 32))))


def test_reader_is_gguf_pys(codecs: Codecs, scratch: Scratch):
    x = many_floats()
    blocks = plain_rows(x)
    ours = np.empty_like(x)
    codecs.q8_0_to_f32(blocks, ours, scratch, Tally())
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
    nan = np.isnan(theirs)
    np.testing.assert_array_equal(plain.bits_of(ours)[~nan], plain.bits_of(theirs)[~nan])
    np.testing.assert_array_equal(plain.bits_of(ours)[nan], 0x7FC00000)


@pytest.mark.parametrize("columns", [1, 31, 48])
def test_a_row_that_is_no_whole_group_is_refused(codecs: Codecs, scratch: Scratch, columns: int):
    with pytest.raises(ValueError, match="Q8_0"):
        codecs.f32_to_q8_0(np.ones((2, columns), np.float32), np.empty((2, 34), np.uint8), scratch, Tally())
    with pytest.raises(ValueError, match="Q8_0"):
        codecs.fp8_to_q8_0(
            np.ones((2, columns), np.uint8),
            np.ones((2, 2), np.uint8),
            (1, 32),
            np.empty((2, 34), np.uint8),
            scratch,
            Tally(),
        )


def test_an_empty_tile_is_no_error(codecs: Codecs, scratch: Scratch):
    empty = np.zeros((0, 32), np.uint8)
    none = np.zeros((0, 1), np.uint8)
    assert quantise(codecs, "fp8_to_q8_0", empty, none, (1, 32), shape=(0, 32), scratch=scratch)[1] == Tally()
    assert quantise(codecs, "f32_to_q8_0", empty.astype(np.float32), shape=(0, 32), scratch=scratch)[1] == Tally()
