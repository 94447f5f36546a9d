"""Integers of four bits: every nibble under every zero point, against plain arithmetic."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dsv4convert.formats.base import Scratch, Tally
from dsv4convert.formats.int4 import int4_to_float, unpack_zeros

BYTES = np.arange(256, dtype=np.uint8)
NIBBLES = np.stack([BYTES & 15, BYTES >> 4], axis=-1).reshape(-1).astype(np.float64)
KINDS: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}


def as_floats(out: np.ndarray) -> np.ndarray:
    return (out.view(ml_dtypes.bfloat16) if out.dtype == np.uint16 else out).astype(np.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_every_nibble_times_a_scale_is_rounded_once_and_counted(kind: str) -> None:
    scale = np.array([[1.0], [0.3], [2.0**-100], [1e38]], np.float32)
    packed = np.broadcast_to(BYTES, (len(scale), 256)).copy()
    out, tally = np.empty((len(scale), 512), KINDS[kind]), Tally()
    int4_to_float(packed, scale, None, (1, 512), out, Scratch(), tally)
    exact = (NIBBLES - 8) * scale.astype(np.float64)
    plain = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[kind]
    with np.errstate(over="ignore"):
        wanted = exact.astype(plain).astype(np.float64)
    assert np.array_equal(as_floats(out), wanted)
    assert tally.changed + tally.overflow + tally.underflow == int((wanted != exact).sum())


@pytest.mark.parametrize("zero", range(16))
def test_every_nibble_less_every_zero_point(zero: int) -> None:
    out = np.empty((1, 512), np.float32)
    zeros = np.full((1, 4), zero, np.uint8)
    int4_to_float(BYTES[None], np.ones((1, 4), np.float32), zeros, (1, 128), out, Scratch(), Tally())
    assert np.array_equal(out[0], NIBBLES - zero)


def test_zero_points_of_eight_rows_are_in_a_word() -> None:
    zeros = np.random.default_rng(3).integers(0, 16, (20, 5)).astype(np.uint8)
    words = np.zeros((3, 5), np.uint32)
    for row, values in enumerate(zeros):
        words[row // 8] |= values.astype(np.uint32) << np.uint32(4 * (row % 8))
    assert np.array_equal(unpack_zeros(words.view(np.int32), 20), zeros)


def test_shapes_that_do_not_fit_are_refused() -> None:
    packed, out = np.zeros((2, 64), np.uint8), np.empty((2, 128), np.float32)
    with pytest.raises(ValueError, match="scale of a 2x128 tile"):
        int4_to_float(packed, np.ones((2, 3), np.float32), None, (1, 64), out, Scratch(), Tally())
    with pytest.raises(ValueError, match="zero points of a 2x128 tile"):
        int4_to_float(packed, np.ones((2, 2), np.float32), np.ones((1, 2)), (1, 64), out, Scratch(), Tally())
