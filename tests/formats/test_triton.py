"""The Triton codecs give the numpy codecs' bits and counts, on every code and every scale byte.

Triton decides at import whether its interpreter runs the kernels, so the cases run in a process of
their own, once. On a machine with a GPU they run there: `python tests/formats/test_triton.py --device cuda`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4convert.formats import e2m1, e4m3, mxfp4, nvfp4, q8_0
from dsv4convert.formats.base import Scratch, Tally

BYTES = np.arange(256, dtype=np.uint8)
# What no codec may leave in its output.
POISON = 0xA5

# (rows, columns) and scale block: ragged edges, rows that end inside a 16-byte vector, one row, one column of blocks.
RAGGED = (
    ((130, 264), (128, 128)),
    ((7, 96), (1, 32)),
    ((33, 160), (32, 32)),
    ((70, 1056), (128, 128)),
    ((1, 32), (128, 128)),
    ((5, 64), (2, 6)),
)

CASES: dict[str, Callable[[Any], None]] = {}


def case(function: Callable[[Any], None]) -> Callable[[Any], None]:
    """Register a case, which gets the device; its name is its test's."""
    CASES[function.__name__] = function
    return function


def run_both(
    device: Any,
    numpy_codec: Callable[..., None],
    triton_codec: Callable[..., None],
    inputs: list[Any],
    outputs: list[tuple[tuple[int, ...], Any]],
    shift: int = 0,
) -> Tally:
    """Run a codec in numpy and in Triton, compare bits and counts, return the counts.

    ``inputs`` are arrays, and the block where it comes; ``outputs`` are (shape, dtype). Byte inputs and
    outputs lie ``shift`` bytes behind an aligned address.
    """
    import torch

    def to_device(array: np.ndarray[Any, Any]) -> Any:
        if array.dtype != np.uint8 or not shift:
            return torch.from_numpy(array).to(device)
        moved = torch.empty(array.size + shift, dtype=torch.uint8, device=device)[shift:]
        moved.copy_(torch.from_numpy(array.reshape(-1)))
        return moved.view(array.shape)

    expected = [np.full(shape, POISON, dtype) for shape, dtype in outputs]
    wanted = Tally()
    numpy_codec(*inputs, *expected, Scratch(), wanted)
    made = [to_device(np.full(shape, POISON, dtype)) for shape, dtype in outputs]
    counted = Tally()
    arguments = [to_device(value) if isinstance(value, np.ndarray) else value for value in inputs]
    triton_codec(*arguments, *made, None, counted)
    for array, tensor in zip(expected, made, strict=True):
        np.testing.assert_array_equal(tensor.cpu().numpy(), array)
    assert counted == wanted, f"{counted} instead of {wanted}"
    return wanted


def scales_for(rng: np.random.Generator, shape: tuple[int, int], block: tuple[int, int], low: int, high: int) -> Any:
    """Return random scale bytes low..high for a matrix of ``shape``."""
    return rng.integers(low, high + 1, (-(-shape[0] // block[0]), -(-shape[1] // block[1])), dtype=np.uint8)


def float_scales(rng: np.random.Generator, like: Any) -> Any:
    """Return float32 scales of all magnitudes and both signs, with zero, infinity, NaN and subnormals among them."""
    scale = rng.standard_normal(like.shape) * 10.0 ** rng.uniform(-44, 38, like.shape)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 2.0**-149, 2.0**-127, -(2.0**20), 2.0**127])
    chosen = scale.reshape(-1)[:: max(1, scale.size // special.size)][: special.size]
    chosen[:] = rng.permutation(special)[: chosen.size]
    return scale.astype(np.float32)


def sound_fp8(rng: np.random.Generator, shape: tuple[int, int]) -> Any:
    """Return random e4m3 codes without NaN."""
    return rng.integers(0, 0x7F, shape, dtype=np.uint8) | (rng.integers(0, 2, shape, dtype=np.uint8) << 7)


def with_shape(shape: tuple[int, int]) -> list[tuple[tuple[int, int], Any]]:
    """Return the outputs of a codec to bfloat16 bits."""
    return [(shape, np.uint16)]


@case
def fp8_to_bf16_is_equal_for_every_code_and_scale_byte(device: Any) -> None:
    from dsv4convert.formats.triton.bf16 import fp8_to_bf16

    codes = np.tile(BYTES, (256, 1))
    tally = run_both(
        device, e4m3.fp8_to_bf16, fp8_to_bf16, [codes, BYTES[:, None].copy(), (1, 256)], with_shape((256, 256))
    )
    assert tally.nan
    assert tally.overflow
    assert tally.underflow


@case
def fp4_to_bf16_is_equal_for_every_byte_and_scale_byte(device: Any) -> None:
    from dsv4convert.formats.triton.bf16 import fp4_to_bf16

    packed = np.tile(BYTES, (256, 1))
    tally = run_both(
        device, e2m1.fp4_to_bf16, fp4_to_bf16, [packed, BYTES[:, None].copy(), (1, 512)], with_shape((256, 512))
    )
    assert tally.nan
    assert tally.overflow


@case
def bf16_is_equal_at_ragged_edges(device: Any) -> None:
    from dsv4convert.formats.triton.bf16 import fp4_to_bf16, fp8_to_bf16

    rng = np.random.default_rng(1)
    for shape, block in RAGGED:
        scale = scales_for(rng, shape, block, 100, 130)
        fp8 = sound_fp8(rng, shape)
        fp4 = rng.integers(0, 256, (shape[0], shape[1] // 2), dtype=np.uint8)
        for scales in (scale, np.exp2(scale.astype(np.float32) - 127), float_scales(rng, scale)):
            run_both(device, e4m3.fp8_to_bf16, fp8_to_bf16, [fp8, scales, block], with_shape(shape))
            run_both(device, e2m1.fp4_to_bf16, fp4_to_bf16, [fp4, scales, block], with_shape(shape))


@case
def columns_that_fill_no_vector_are_decoded(device: Any) -> None:
    from dsv4convert.formats.triton.bf16 import fp4_to_bf16, fp8_to_bf16

    rng = np.random.default_rng(2)
    block = (2, 3)
    fp8 = sound_fp8(rng, (5, 13))
    scale = scales_for(rng, (5, 13), block, 0, 255)
    run_both(device, e4m3.fp8_to_bf16, fp8_to_bf16, [fp8, scale, block], with_shape((5, 13)))
    fp4 = rng.integers(0, 256, (5, 7), dtype=np.uint8)
    scale = scales_for(rng, (5, 14), block, 0, 255)
    run_both(device, e2m1.fp4_to_bf16, fp4_to_bf16, [fp4, scale, block], with_shape((5, 14)))


@case
def one_nan_in_a_sound_tensor_is_found(device: Any) -> None:
    from dsv4convert.formats.triton.bf16 import fp8_to_bf16
    from dsv4convert.formats.triton.q8_0 import fp8_to_q8_0

    rng = np.random.default_rng(3)
    sound = sound_fp8(rng, (40, 1024))
    scale = scales_for(rng, sound.shape, (128, 128), 120, 130)
    # Each place in a word, both signs, in the first, a middle and the last tile.
    for row, column, code in ((0, 0, 0x7F), (17, 513, 0xFF), (17, 514, 0x7F), (39, 1023, 0xFF)):
        fp8 = sound.copy()
        fp8[row, column] = code
        tally = run_both(device, e4m3.fp8_to_bf16, fp8_to_bf16, [fp8, scale, (128, 128)], with_shape(fp8.shape))
        assert tally == Tally(nan=1)
        outputs = [((40, 1024 // 32 * 34), np.uint8)]
        tally = run_both(device, q8_0.fp8_to_q8_0, fp8_to_q8_0, [fp8, scale, (128, 128)], outputs)
        assert tally == Tally(nan=1)


@case
def fp4_to_mxfp4_is_equal_for_every_byte_and_scale_byte(device: Any) -> None:
    from dsv4convert.formats.triton.mxfp4 import fp4_to_mxfp4

    packed = np.tile(BYTES, (256, 1))
    scale = np.repeat(BYTES[:, None], 16, axis=1)
    tally = run_both(device, mxfp4.fp4_to_mxfp4, fp4_to_mxfp4, [packed, scale], [((256, 16 * 17), np.uint8)])
    assert tally == Tally(nan=512)


@case
def mxfp4_is_equal_for_any_number_of_blocks(device: Any) -> None:
    from dsv4convert.formats.triton.mxfp4 import fp4_to_mxfp4

    rng = np.random.default_rng(4)
    for rows, groups in ((1, 1), (3, 1), (1, 5), (9, 7), (64, 1), (259, 5)):
        packed = rng.integers(0, 256, (rows, groups * 16), dtype=np.uint8)
        scale = rng.integers(0, 256, (rows, groups), dtype=np.uint8)
        run_both(device, mxfp4.fp4_to_mxfp4, fp4_to_mxfp4, [packed, scale], [((rows, groups * 17), np.uint8)])


@case
def nvfp4_to_bf16_is_equal_for_every_byte_and_every_scale(device: Any) -> None:
    from dsv4convert.formats.triton.nvfp4 import nvfp4_to_bf16

    packed = np.tile(BYTES, (256, 1))
    scale = np.repeat(BYTES[:, None], 32, axis=1)
    counts = Tally()
    for second, is_reciprocal in ((1.0, False), (0.00317, False), (719.3, True), (3e38, False), (2.0**-140, False)):
        counts.add(
            run_both(
                device,
                nvfp4.nvfp4_to_bf16,
                nvfp4_to_bf16,
                [packed, scale, second, is_reciprocal],
                with_shape((256, 512)),
            )
        )
    assert counts.nan
    assert counts.changed
    assert counts.overflow
    assert counts.underflow


@case
def nvfp4_to_bf16_is_equal_at_ragged_edges(device: Any) -> None:
    from dsv4convert.formats.triton.nvfp4 import nvfp4_to_bf16

    rng = np.random.default_rng(17)
    for rows, columns in ((7, 96), (1, 16), (33, 176), (70, 1056)):
        packed = rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
        scale = rng.integers(0, 0x7F, (rows, columns // 16), dtype=np.uint8)
        inputs = [packed, scale, 0.0123, False]
        run_both(device, nvfp4.nvfp4_to_bf16, nvfp4_to_bf16, inputs, with_shape((rows, columns)))


def fp8_outputs(shape: tuple[int, int]) -> list[tuple[tuple[int, int], Any]]:
    """Return the outputs of fp4_to_fp8: codes and scales."""
    return [(shape, np.uint8), ((-(-shape[0] // 128), -(-shape[1] // 128)), np.uint8)]


@case
def fp4_to_fp8_is_equal_for_every_byte_and_difference_of_scales(device: Any) -> None:
    from dsv4convert.formats.triton.fp8 import fp4_to_fp8

    # Every row has all 256 packed bytes; each tile's first row holds its largest scale, and the others
    # go through the differences from it. The last columns show what happens at the ends of the range.
    for top in (0, 1, 5, 6, 7, 40, 127, 253, 254):
        packed = np.tile(BYTES, (128, 2))
        scale = np.maximum(top - np.arange(128)[:, None] // 3, 0).astype(np.uint8) + np.zeros((1, 32), np.uint8)
        run_both(device, e2m1.fp4_to_fp8, fp4_to_fp8, [packed, scale], fp8_outputs((128, 1024)))
    scale[1:, :8] = 255
    scale[:, 8:12] = 255
    tally = run_both(device, e2m1.fp4_to_fp8, fp4_to_fp8, [packed, scale], fp8_outputs((128, 1024)))
    assert tally.nan == (127 * 8 + 128 * 4) * 32


@case
def fp4_to_fp8_is_equal_at_ragged_edges_and_counts_changes(device: Any) -> None:
    from dsv4convert.formats.triton.fp8 import fp4_to_fp8

    rng = np.random.default_rng(5)
    for shape in ((1, 32), (130, 320), (37, 1184), (5, 40), (3, 34)):
        packed = rng.integers(0, 256, (shape[0], shape[1] // 2), dtype=np.uint8)
        lossless = scales_for(rng, shape, (1, 32), 110, 121)
        tally = run_both(device, e2m1.fp4_to_fp8, fp4_to_fp8, [packed, lossless], fp8_outputs(shape))
        assert tally == Tally()
        lossy = scales_for(rng, shape, (1, 32), 0, 255)
        tally = run_both(device, e2m1.fp4_to_fp8, fp4_to_fp8, [packed, lossy], fp8_outputs(shape))
        assert tally.changed or lossy.size == 1


@case
def fp8_to_q8_0_is_equal_for_every_pair_of_largest_code_and_code(device: Any) -> None:
    from dsv4convert.formats.triton.q8_0 import fp8_to_q8_0

    # Blocks of one largest code and 31 others, until each largest code has met each code below it.
    blocks = []
    for largest in range(127):
        codes = np.concatenate([BYTES[: largest + 1], BYTES[: largest + 1] | 0x80])
        codes = np.resize(codes, -(-codes.size // 31) * 31).reshape(-1, 31)
        blocks.append(np.concatenate([np.full((len(codes), 1), largest, np.uint8), codes], axis=1))
    weight = np.concatenate(blocks)
    outputs = [((len(weight), 34), np.uint8)]
    for byte in (0, 1, 5, 6, 16, 17, 100, 110, 127, 134, 135, 140, 200, 246, 247, 254, 255):
        scale = np.full((len(weight), 1), byte, np.uint8)
        run_both(device, q8_0.fp8_to_q8_0, fp8_to_q8_0, [weight, scale, (1, 32)], outputs)


@case
def fp8_to_q8_0_is_equal_at_ragged_edges(device: Any) -> None:
    from dsv4convert.formats.triton.q8_0 import fp8_to_q8_0

    rng = np.random.default_rng(6)
    for (rows, columns), block in RAGGED:
        shape = (rows, columns // 32 * 32)
        outputs = [((rows, columns // 32 * 34), np.uint8)]
        for weight, low, high in ((sound_fp8(rng, shape), 112, 130), (np.resize(BYTES, shape), 0, 255)):
            scale = scales_for(rng, shape, block, low, high)
            run_both(device, q8_0.fp8_to_q8_0, fp8_to_q8_0, [weight, scale, block], outputs)
            run_both(device, q8_0.fp8_to_q8_0, fp8_to_q8_0, [weight, float_scales(rng, scale), block], outputs)


@case
def tensors_off_the_16_byte_boundary_are_converted(device: Any) -> None:
    from dsv4convert.formats.triton import bf16 as triton_bf16
    from dsv4convert.formats.triton import fp8 as triton_fp8
    from dsv4convert.formats.triton import mxfp4 as triton_mxfp4
    from dsv4convert.formats.triton import q8_0 as triton_q8_0

    rng = np.random.default_rng(7)
    fp8 = sound_fp8(rng, (3, 64))
    fp4 = rng.integers(0, 256, (3, 32), dtype=np.uint8)
    scale = scales_for(rng, (3, 64), (1, 32), 110, 130)
    block = (1, 32)
    bf16 = with_shape((3, 64))
    run_both(device, e4m3.fp8_to_bf16, triton_bf16.fp8_to_bf16, [fp8, scale, block], bf16, shift=1)
    run_both(device, e2m1.fp4_to_bf16, triton_bf16.fp4_to_bf16, [fp4, scale, block], bf16, shift=1)
    run_both(device, mxfp4.fp4_to_mxfp4, triton_mxfp4.fp4_to_mxfp4, [fp4, scale], [((3, 34), np.uint8)], shift=3)
    run_both(device, e2m1.fp4_to_fp8, triton_fp8.fp4_to_fp8, [fp4, scale], fp8_outputs((3, 64)), shift=8)
    run_both(device, q8_0.fp8_to_q8_0, triton_q8_0.fp8_to_q8_0, [fp8, scale, block], [((3, 68), np.uint8)], shift=4)


@case
def counts_can_stay_on_the_device(device: Any) -> None:
    import torch

    from dsv4convert.formats.triton.bf16 import fp8_to_bf16
    from dsv4convert.formats.triton.scalar import DeviceTally

    weight = torch.full((2, 64), 0x7F, dtype=torch.uint8, device=device)
    scale = torch.full((1, 1), 127, dtype=torch.uint8, device=device)
    out = torch.empty((2, 64), dtype=torch.bfloat16, device=device)
    tally = DeviceTally(device)
    fp8_to_bf16(weight, scale, (128, 128), out, None, tally)
    fp8_to_bf16(weight, scale, (128, 128), out, None, tally)
    assert tally.read() == Tally(nan=256)
    assert bool(out.isnan().all())


@case
def empty_tensors_are_left_alone(device: Any) -> None:
    import torch

    from dsv4convert.formats.triton import bf16 as triton_bf16
    from dsv4convert.formats.triton import mxfp4 as triton_mxfp4

    empty = torch.empty((0, 64), dtype=torch.uint8, device=device)
    out = torch.empty((0, 64), dtype=torch.bfloat16, device=device)
    no_scale = torch.empty((0, 1), dtype=torch.uint8, device=device)
    triton_bf16.fp8_to_bf16(empty, no_scale, (128, 128), out, None, Tally())
    blocks = torch.empty((0, 68), dtype=torch.uint8, device=device)
    scales = torch.empty((0, 4), dtype=torch.uint8, device=device)
    triton_mxfp4.fp4_to_mxfp4(empty, scales, blocks, None, Tally())


def floats_for(rng: np.random.Generator, shape: tuple[int, int], low: int, high: int) -> Any:
    """Return float32 values of magnitudes 2^low to 2^high, and among them zeros of both signs and exact halves."""
    values = np.ldexp(rng.uniform(-2, 2, shape), rng.integers(low, high + 1, shape)).astype(np.float32)
    values[rng.random(shape) < 0.05] = 0.0
    values[rng.random(shape) < 0.05] = -0.0
    ties = rng.random(shape) < 0.3
    values[ties] = np.ldexp(rng.integers(-64, 65, shape), low).astype(np.float32)[ties]
    return values


def quantised(block: tuple[int, int]) -> Callable[..., None]:
    """Return numpy's quantiser of FP8, codes and scales in one call as Triton has them."""

    def both(values: Any, out: Any, out_scale: Any, scratch: Scratch, tally: Tally) -> None:
        e4m3.f32_to_fp8(values, block, out, scratch, tally)
        e4m3.f32_to_fp8_scales(values, block, out_scale, scratch, Tally())

    return both


def quantised_fp4(values: Any, out: Any, out_scale: Any, scratch: Scratch, tally: Tally) -> None:
    e2m1.f32_to_fp4(values, out, scratch, tally)
    e2m1.f32_to_fp4_scales(values, out_scale, scratch, Tally())


def check_fp8(device: Any, values: Any, block: tuple[int, int]) -> Tally:
    from dsv4convert.formats.triton.quantise import f32_to_fp8

    def triton_codec(values: Any, out: Any, out_scale: Any, scratch: None, tally: Tally) -> None:
        f32_to_fp8(values, block, out, out_scale, scratch, tally)

    grid = -(-values.shape[0] // block[0]), -(-values.shape[1] // block[1])
    outputs = [(values.shape, np.uint8), (grid, np.uint8)]
    return run_both(device, quantised(block), triton_codec, [values], outputs)


def check_fp4(device: Any, values: Any) -> Tally:
    from dsv4convert.formats.triton.quantise import f32_to_fp4

    rows, columns = values.shape
    outputs = [((rows, columns // 2), np.uint8), ((rows, columns // 32), np.uint8)]
    return run_both(device, quantised_fp4, f32_to_fp4, [values], outputs)


@case
def floats_are_rounded_to_fp8_alike_on_every_exponent(device: Any) -> None:
    rng = np.random.default_rng(18)
    for shape, block in (((130, 264), (128, 128)), ((33, 160), (32, 32)), ((7, 96), (1, 32)), ((1, 1), (128, 128))):
        for low, high in ((-149, -120), (-30, -14), (-12, 3), (-3, 4), (100, 126), (-149, 126)):
            check_fp8(device, floats_for(rng, shape, low, high), block)


@case
def every_step_and_tie_of_e4m3_is_rounded_alike(device: Any) -> None:
    """Every number between two codes at a quarter of the way, on a tie and next to it, with 448 in the block."""
    codes = np.arange(0x7E, dtype=np.uint8).astype(np.int64)
    edges = np.where(codes < 8, codes * 2.0**-9, (8 + codes % 8) * 2.0 ** (codes // 8 - 10))
    halves = (edges[:-1] + edges[1:]) / 2
    around = [np.nextafter(halves.astype(np.float32), np.float32(side)) for side in (0, 1000)]
    values = np.concatenate([edges, halves, *around, (edges[:-1] + halves) / 2]).astype(np.float32)
    row = np.zeros((1, -(-(2 * len(values) + 1) // 32) * 32), np.float32)
    row[0, : 2 * len(values)] = np.concatenate([values, -values])
    row[0, -1] = 448
    for power in (-20, -10, 0, 1, 90):
        tally = check_fp8(device, np.ldexp(row, power), (1, 1024))
        assert tally.changed
        assert tally.underflow


@case
def floats_are_rounded_to_fp4_alike_on_every_exponent(device: Any) -> None:
    rng = np.random.default_rng(19)
    for shape in ((7, 96), (130, 32), (1, 2048)):
        for low, high in ((-149, -120), (-130, -122), (-3, 2), (-2, 1), (100, 126), (-149, 126)):
            check_fp4(device, floats_for(rng, shape, low, high))


@case
def every_step_and_tie_of_e2m1_is_rounded_alike(device: Any) -> None:
    edges = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    halves = (edges[:-1] + edges[1:]) / 2
    around = [np.nextafter(halves, np.float32(side)) for side in (0, 10)]
    values = np.concatenate([edges, halves, *around])
    row = np.zeros((1, 64), np.float32)
    row[0, : len(values)], row[0, 32 : 32 + len(values)] = values, -values
    row[0, [31, 63]] = 6
    for power in (-126, -125, -40, 0, 60, 124):
        assert check_fp4(device, np.ldexp(row, power)).changed == 2 * (len(values) - len(edges))


@case
def amax_at_the_edge_of_a_scale_takes_the_same_scale(device: Any) -> None:
    for top in (448.0, 1e-4, 6.0, 6 * 2.0**-126):
        for power in (-3, 0, 1):
            for value in (np.float32(top), np.nextafter(np.float32(top), np.float32(np.inf)), np.float32(top * 0.75)):
                values = np.zeros((4, 64), np.float32)
                values[1, 5] = np.ldexp(value, power)
                check_fp8(device, values, (128, 128))
                check_fp4(device, values)


@case
def values_that_are_not_finite_are_refused_and_not_counted(device: Any) -> None:
    import torch

    from dsv4convert.errors import LossyError
    from dsv4convert.formats.triton.quantise import f32_to_fp4, f32_to_fp8

    for bad in (np.nan, np.inf, -np.inf):
        values = torch.full((4, 64), 0.3, device=device)
        values[3, 40] = bad
        codes, scales = (torch.zeros(shape, dtype=torch.uint8, device=device) for shape in ((4, 64), (4, 2)))
        tally = Tally()
        with pytest.raises(LossyError, match="cannot be quantised"):
            f32_to_fp8(values, (1, 32), codes, scales, None, tally)
        with pytest.raises(LossyError, match="cannot be quantised"):
            f32_to_fp4(values, codes[:, :32].contiguous(), scales, None, tally)
        assert tally == Tally()


@case
def tensors_that_do_not_fit_are_refused(device: Any) -> None:
    import torch

    from dsv4convert.formats.triton.bf16 import fp8_to_bf16
    from dsv4convert.formats.triton.q8_0 import fp8_to_q8_0

    weight = torch.zeros((4, 40), dtype=torch.uint8, device=device)
    scale = torch.zeros((1, 1), dtype=torch.uint8, device=device)
    out = torch.zeros((4, 40), dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match="scale: expected contiguous"):
        fp8_to_bf16(weight, scale, (1, 32), out, None, Tally())
    with pytest.raises(ValueError, match="out: expected contiguous"):
        fp8_to_bf16(weight, scale, (128, 128), out.float(), None, Tally())
    with pytest.raises(ValueError, match="groups of 32, got 40 columns"):
        fp8_to_q8_0(weight, scale, (128, 128), weight, None, Tally())


def main() -> None:
    """Run the cases and print one JSON line each: the name, and the traceback of a failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    np.seterr(all="ignore")
    for name, function in CASES.items():
        failure = None
        try:
            function(device)
        except Exception:  # noqa: BLE001 - the parent process reports it as that case's failure
            failure = traceback.format_exc()
        sys.stdout.write(json.dumps([name, failure]) + "\n")


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    """Return what became of each case: None, or a traceback."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", __file__],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", CASES)
def test_triton(name: str, outcomes: dict[str, str | None]) -> None:
    pytest.importorskip("triton")
    failure = outcomes[name]
    assert failure is None, failure


if __name__ == "__main__":
    main()
