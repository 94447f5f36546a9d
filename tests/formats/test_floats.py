"""Conversions among F32, BF16, F16 and integers: every 16-bit value, rounding against torch, the counts."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from dsv4convert.formats.backend import Codecs
from dsv4convert.formats.base import Scratch, Tally
from tests.oracles import plain_codecs as plain

ALL_16 = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)


def convert(codecs: Codecs, name: str, source: np.ndarray, kind: str, scratch: Scratch) -> tuple[np.ndarray, Tally]:
    out = np.full(source.shape, 77, plain.STORAGE[kind])
    tally = Tally()
    getattr(codecs, name)(source, out, scratch, tally)
    return plain.bits_of(out), tally


def check(codecs: Codecs, name: str, source: np.ndarray, values: np.ndarray, kind: str, scratch: Scratch) -> None:
    """``values`` are the source's numbers as float64; an infinity that stays one is no overflow."""
    bits, tally = convert(codecs, name, source, kind, scratch)
    want, count = plain.store(values, kind)
    count.overflow -= int(np.isinf(values).sum())
    np.testing.assert_array_equal(bits, want)
    assert tally == count


def test_every_bfloat16(codecs: Codecs, scratch: Scratch):
    with np.errstate(all="ignore"):
        values = ALL_16.view(ml_dtypes.bfloat16).astype(np.float64)
    check(codecs, "bf16_to_f32", ALL_16, values, "f32", scratch)
    check(codecs, "bf16_to_f16", ALL_16, values, "f16", scratch)


def test_every_float16(codecs: Codecs, scratch: Scratch):
    source = ALL_16.view(np.float16)
    check(codecs, "f16_to_f32", source, source.astype(np.float64), "f32", scratch)
    check(codecs, "f16_to_bf16", source, source.astype(np.float64), "bf16", scratch)


def floats() -> list[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(41)
    bits = rng.integers(0, 1 << 32, (64, 999), dtype=np.uint32).view(np.float32)
    upper = (rng.integers(0, 1 << 16, (64, 999), dtype=np.uint32) << 16).view(np.float32)
    ties = ((rng.integers(0, 1 << 16, (64, 999), dtype=np.uint32) << 16) | 0x8000).view(np.float32)
    near = (ties.view(np.uint32) + rng.integers(-1, 2, ties.shape, dtype=np.int32).view(np.uint32)).view(np.float32)
    weights = (rng.standard_normal((64, 999)) * 0.02).astype(np.float32)
    large = np.full((3, 5), np.finfo(np.float32).max, np.float32)
    tiny = np.full((3, 5), 1e-45, np.float32)
    half_ties = (rng.integers(0, 1 << 20, (64, 999)) * 2.0**-30).astype(np.float32)
    names = ["any bits", "bfloat16 already", "ties", "near ties", "weights", "largest", "tiny", "small"]
    return list(zip(names, [bits, upper, ties, near, weights, large, tiny, half_ties], strict=True))


@pytest.mark.parametrize("name", [name for name, _ in floats()])
def test_float32_rounds_to_nearest_even(codecs: Codecs, scratch: Scratch, name: str):
    values = dict(floats())[name]
    with np.errstate(all="ignore"):
        check(codecs, "f32_to_bf16", values, values.astype(np.float64), "bf16", scratch)
        check(codecs, "f32_to_f16", values, values.astype(np.float64), "f16", scratch)


@pytest.mark.parametrize("name", [name for name, _ in floats()])
def test_float32_rounds_as_torch(codecs: Codecs, scratch: Scratch, name: str):
    values = dict(floats())[name]
    bits, _ = convert(codecs, "f32_to_bf16", values, "bf16", scratch)
    theirs = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    nan = np.isnan(values)
    np.testing.assert_array_equal(bits[~nan], theirs[~nan])
    np.testing.assert_array_equal(bits[nan], 0x7FC0)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_the_edges_of_the_range_one_at_a_time(codecs: Codecs, scratch: Scratch, kind: str):
    """Alone, so that no neighbour decides which way the whole tile takes."""
    edges = [0x7F7F0000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0xFFFFFFFF]
    edges += [0x477FE000, 0x477FEFFF, 0x477FF000, 0x00800000, 0x007FFFFF, 0x00010000, 0x00000001, 0x80000000]
    for bits in edges:
        value = np.array([[bits]], np.uint32).view(np.float32)
        with np.errstate(all="ignore"):
            check(codecs, f"f32_to_{kind}", value, value.astype(np.float64), kind, scratch)


def test_integers_out_of_range_saturate_and_are_counted(codecs: Codecs, scratch: Scratch):
    source = np.array([0, -5, 2**31 - 1, -(2**31), 2**31, -(2**31) - 1, 2**40], np.int64)
    out = np.empty(source.shape, np.int32)
    tally = Tally()
    codecs.i64_to_i32(source, out, scratch, tally)
    np.testing.assert_array_equal(out, [0, -5, 2**31 - 1, -(2**31), 2**31 - 1, -(2**31), 2**31 - 1])
    assert tally == Tally(overflow=3)


def test_tallies_add_up():
    total = Tally(1, 2, 3, 4)
    total.add(Tally(10, 20, 30, 40))
    assert total == Tally(11, 22, 33, 44)
    assert not total.lossless
    assert Tally(nan=3).lossless
