"""MLX's affine mode of eight bits: the rule on groups at its edges; MLX itself is asked in ``test_mlx_loads``."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from dsv4convert.formats.base import Scratch, Tally
from dsv4convert.formats.mlx_affine import Part, bf16_to_affine8
from dsv4convert.verification.numbers import affine8_bits


def parts_of(values: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Tally]:
    """Return codes, and float32 scales and biases, of bfloat16 values."""
    rows, columns = values.shape
    tally, made = Tally(), {}
    for part in ("codes", "scales", "biases"):
        kind: Part = part  # type: ignore[assignment]
        out = np.empty((rows, columns) if part == "codes" else (rows, columns // group), np.uint8)
        out = out if part == "codes" else np.empty(out.shape, np.uint16)
        bf16_to_affine8(values.view(np.uint16), group, kind, out, Scratch(), tally)
        made[part] = out if part == "codes" else out.view(ml_dtypes.bfloat16).astype(np.float32)
    return made["codes"], made["scales"], made["biases"], tally


def groups_at_the_edges(group: int, random: np.random.Generator) -> np.ndarray:
    values = (random.standard_normal((64, 4 * group)) * np.exp2(random.integers(-30, 20, (64, 1)))).astype(np.float32)
    values[0], values[1], values[2] = 0, np.abs(values[1]), -np.abs(values[2])
    values[3] = values[3, 0]
    values[4, :group], values[5, ::group] = 0, 1e30
    values[6] = 1e-9
    values[7, 0], values[7, 1:group] = -3, np.linspace(-1, 3, group - 1)  # both ends as far
    return values.astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("group", [32, 64])
def test_zero_is_a_code_and_errors_are_within_half_a_step(group: int) -> None:
    values = groups_at_the_edges(group, np.random.default_rng(1))
    codes, scales, biases, tally = parts_of(values, group)
    spread, offset = np.repeat(scales, group, axis=1), np.repeat(biases, group, axis=1)
    made = codes * spread.astype(np.float64) + offset
    exact = values.astype(np.float64)
    # Half a step, and what rounding scale and bias to bfloat16 adds.
    allowed = np.abs(spread) * 0.51 + (np.abs(spread) * codes + np.abs(offset)) * 2.0**-8 + 1e-7
    assert (np.abs(made - exact) <= allowed).all()
    assert tally.changed == int((made != exact).sum())


@pytest.mark.parametrize("group", [32, 64])
def test_the_second_opinion_has_the_same_bits(group: int) -> None:
    values = groups_at_the_edges(group, np.random.default_rng(2))
    codes, scales, biases, _ = parts_of(values, group)
    bits = affine8_bits(values.astype(np.float64), group)
    assert np.array_equal(bits & np.uint64(0xFF), codes)
    for shift, held in ((8, scales), (24, biases)):
        kept = np.repeat(held.astype(ml_dtypes.bfloat16).view(np.uint16), group, axis=1)
        assert np.array_equal(bits >> np.uint64(shift) & np.uint64(0xFFFF), kept)


def test_what_does_not_fit_is_refused() -> None:
    half = np.zeros((2, 96), np.uint16)
    with pytest.raises(ValueError, match="codes of 2x96 elements in groups of 64"):
        bf16_to_affine8(half, 64, "codes", np.empty((2, 96), np.uint8), Scratch(), Tally())
    half[1, 5] = 0x7F80
    with pytest.raises(ValueError, match="NaN or infinity"):
        bf16_to_affine8(half, 32, "codes", np.empty((2, 96), np.uint8), Scratch(), Tally())
