"""NVFP4: the cast of FP4 on every scale and every code, against ml_dtypes and against what ModelOpt made."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dsv4convert.errors import LossyError
from dsv4convert.formats.backend import Codecs
from dsv4convert.formats.base import Scratch, Tally
from dsv4convert.formats.e4m3 import NAN_CODE
from dsv4convert.formats.ggml_decode import dequantise
from dsv4convert.formats.nvfp4 import EXACT_SPAN, fp4_to_nvfp4, largest_scale, second_scale

from ..oracles.modelopt_nvfp4 import RECORD, SPANS

BYTES = np.arange(256, dtype=np.uint8)
NAN = 255
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
# Where the sign of zero is lost: ModelOpt reads and writes code 8 as 0.
MINUS_ZERO = 8


def unpacked(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def values_of(packed: np.ndarray, scale: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the exact values of NVFP4."""
    spread = np.repeat(scale.view(ml_dtypes.float8_e4m3fn).astype(np.float64), 16, axis=1)
    return E2M1[unpacked(packed)] * spread * float(second.reshape(-1)[0])


def fp4_values(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    power = scale.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    return E2M1[unpacked(packed)] * np.repeat(power, 32, axis=1)


def cast(codecs: Codecs, packed: np.ndarray, scale: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray, Tally]:
    codes, scales = np.full_like(packed, 9), np.full((len(scale), 2 * scale.shape[1]), 9, np.uint8)
    tally = Tally()
    codecs.fp4_to_nvfp4(packed, scale, largest, codes, Scratch(), tally)
    codecs.fp4_to_nvfp4_scales(scale, largest, scales, Scratch(), tally)
    return codes, scales, tally


@pytest.mark.parametrize("span", range(EXACT_SPAN + 1))
def test_every_code_at_every_scale_is_exact_within_the_span(codecs: Codecs, span: int) -> None:
    """All 256 packed bytes at each scale byte, the largest byte of their matrix being ``span`` above it."""
    scale = BYTES[: NAN - span, None].repeat(16, axis=1)
    packed = np.broadcast_to(BYTES, (len(scale), 256)).copy()
    for first in range(0, len(scale), 51):
        rows = slice(first, first + 51)
        for row in range(*rows.indices(len(scale))):
            one = slice(row, row + 1)
            codes, scales, tally = cast(codecs, packed[one], scale[one], row + span)
            assert np.array_equal(codes, packed[one])
            assert tally == Tally()
            made = values_of(codes, scales, second_scale(row + span))
            assert np.array_equal(made, fp4_values(packed[one], scale[one]))


@pytest.mark.parametrize("largest", [0, 1, 17, 18, 30, 127, 200, 254])
def test_codes_of_scales_below_the_span_are_rounded_once_and_counted(codecs: Codecs, largest: int) -> None:
    scale = BYTES[: largest + 1, None].repeat(16, axis=1)
    packed = np.broadcast_to(BYTES, (len(scale), 256)).copy()
    codes, scales, tally = cast(codecs, packed, scale, largest)
    shift = np.minimum(scale.astype(int) - (largest - EXACT_SPAN), 0)
    exact = E2M1[unpacked(packed)] * np.repeat(np.ldexp(1.0, shift), 32, axis=1)
    rounded = exact.astype(ml_dtypes.float4_e2m1fn)
    assert np.array_equal(unpacked(codes), rounded.view(np.uint8))
    assert tally == Tally(changed=int((rounded.astype(np.float64) != exact).sum()))
    power = np.maximum(scale.astype(int) - largest + 8, -9)
    want = np.ldexp(1.0, power).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert np.array_equal(scales, np.repeat(want, 2, axis=1))


def test_zeros_of_any_scale_are_exact(codecs: Codecs) -> None:
    packed = np.full((1, 16 * 255), 0x80, np.uint8)
    codes, _, tally = cast(codecs, packed, BYTES[None, :NAN], 254)
    assert np.array_equal(codes, packed)
    assert tally == Tally()


def test_nan_scales_stay_and_are_counted(codecs: Codecs) -> None:
    packed = np.broadcast_to(BYTES, (3, 256)).copy()
    scale = np.full((3, 16), 120, np.uint8)
    scale[1, 3:5] = NAN
    codes, scales, tally = cast(codecs, packed, scale, 120)
    assert np.array_equal(codes, packed)
    assert tally == Tally(nan=64)
    assert (scales == 0x7F).sum() == 4
    assert (scales[1, 6:10] == 0x7F).all()


def test_the_second_scale_goes_by_all_matrices_and_by_no_nan() -> None:
    arrays = [np.array([[3, NAN], [7, 2]], np.uint8), np.array([[NAN]], np.uint8), np.array([[90]], np.uint8)]
    assert largest_scale(arrays) == 90
    assert largest_scale(arrays[1:2]) == 127
    for byte in range(NAN):
        assert float(second_scale(byte)[0]) == 2.0 ** (byte - 127 - 8)


def test_shapes_that_do_not_fit_are_refused() -> None:
    packed = np.zeros((2, 32), np.uint8)
    with pytest.raises(ValueError, match="scale of a 2x64 tile"):
        fp4_to_nvfp4(packed, np.zeros((2, 4), np.uint8), 1, packed, Scratch(), Tally())
    with pytest.raises(ValueError, match="FP4 rows come in groups of 32, got 48 columns"):
        fp4_to_nvfp4(packed[:, :24], np.zeros((2, 2), np.uint8), 1, packed[:, :24], Scratch(), Tally())


# ggml's blocks


def test_blocks_hold_every_byte_and_every_scale_and_decode_to_the_same_values(codecs: Codecs) -> None:
    scale = np.broadcast_to(BYTES[:NAN_CODE, None], (NAN_CODE, 32)).copy()
    packed = np.broadcast_to(BYTES, (NAN_CODE, 256)).copy()
    blocks, tally = np.full((NAN_CODE, 8 * 36), 9, np.uint8), Tally()
    codecs.nvfp4_to_ggml(packed, scale, blocks, Scratch(), tally)
    assert tally == Tally()
    expected = values_of(packed, scale, np.ones(1, np.float32))
    assert np.array_equal(dequantise("nvfp4", blocks), expected)
    parts = blocks.reshape(NAN_CODE, 8, 36)
    assert np.array_equal(parts[:, :, :4].reshape(NAN_CODE, 32), scale)
    runs = parts[:, :, 4:].reshape(NAN_CODE, 32, 8)
    codes = np.concatenate([runs & 15, runs >> 4], axis=-1).reshape(NAN_CODE, 512)
    assert np.array_equal(codes, unpacked(packed))  # code 8 as well, which decoders read as 0


@pytest.mark.parametrize("code", [0x7F, 0x80, 0xB8, 0xFF])
def test_scales_that_ggml_lacks_are_refused(codecs: Codecs, code: int) -> None:
    scale = np.full((3, 8), 0x38, np.uint8)
    scale[1, 5] = code
    with pytest.raises(LossyError, match=f"got 0x{code:02X} for row 1, block 5 of a tile"):
        codecs.nvfp4_to_ggml(np.zeros((3, 64), np.uint8), scale, np.empty((3, 72), np.uint8), Scratch(), Tally())


def test_blocks_that_rows_do_not_fill_are_refused(codecs: Codecs) -> None:
    out = np.empty((2, 36), np.uint8)
    with pytest.raises(ValueError, match="come in blocks of 64, got 96 columns"):
        codecs.nvfp4_to_ggml(np.zeros((2, 48), np.uint8), np.zeros((2, 6), np.uint8), out, Scratch(), Tally())


# ModelOpt


@pytest.fixture(scope="module")
def modelopt() -> dict[str, np.ndarray]:
    assert Path(RECORD).is_file()
    with np.load(RECORD) as record:
        return dict(record)


@pytest.mark.parametrize("name", SPANS)
def test_a_cast_is_that_of_modelopt(codecs: Codecs, name: str, modelopt: dict[str, np.ndarray]) -> None:
    of = {key.rsplit("/", 1)[1]: value for key, value in modelopt.items() if key.startswith(f"cast/{name}/")}
    largest = largest_scale([of["scale"]])
    codes, scales, tally = cast(codecs, of["packed"], of["scale"], largest)
    assert np.array_equal(scales, of["weight_scale"])
    assert second_scale(largest)[0] == of["second"]
    ours, theirs = unpacked(codes), unpacked(of["codes"])
    given = unpacked(of["packed"])
    assert np.array_equal(np.where(given == MINUS_ZERO, 0, ours), theirs)
    low = of["scale"].astype(int) < largest - EXACT_SPAN
    assert of["exact_blocks"] == low.size - low.sum()
    assert bool(tally.changed) == bool(low.any())
