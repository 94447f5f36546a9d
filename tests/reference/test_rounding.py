"""Activation rounding: value by value against ml_dtypes, and its effect on the model."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from dsv4convert.api import load_model
from dsv4convert.errors import UnsupportedError
from dsv4convert.model.tensors import Draft, Store, expected_tensors
from dsv4convert.reference import Model, WeightSource
from dsv4convert.reference.parameters import Parameters
from dsv4convert.reference.rounding import hadamard, round_to_e2m1, round_to_e2m1_scaled_e4m3, round_to_e4m3

from ..v41 import TINY
from .random_model import random_source, random_tokens

Array = npt.NDArray[Any]


def test_e4m3_at_scale_one_equals_ml_dtypes_on_every_bfloat16_in_range() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    x = every[np.isfinite(every) & (np.abs(every) <= 448)]
    x = np.stack([x, np.full_like(x, 448)], axis=1)  # 448 in the block makes its scale 1
    expected = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(round_to_e4m3(x, 2), expected)


def test_e2m1_at_scale_one_equals_ml_dtypes_on_every_bfloat16_in_range() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    x = every[np.isfinite(every) & (np.abs(every) <= 6)]
    x = np.stack([x, np.full_like(x, 6)], axis=1)
    expected = x.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(round_to_e2m1(x, 2), expected)


@pytest.mark.parametrize(
    ("amax", "scale"),
    [(448, 1), (449, 2), (447, 1), (224, 0.5), (225, 1), (1e-4, 2**-22), (1e-9, 2**-22), (3.5, 2**-7)],
)
def test_e4m3_scale_is_the_power_of_two_that_just_fits(amax: float, scale: float) -> None:
    # 15/16 of the least step at the top of the range is rounded away; the step shows the scale.
    x = np.array([[amax, scale * 2**-9, scale * 2**-9 * 0.4]], np.float32)
    rounded = round_to_e4m3(x, 3)
    assert rounded[0, 1] == scale * 2**-9  # the smallest subnormal
    assert rounded[0, 2] == 0


def test_blocks_have_their_own_scales_and_the_last_may_be_short() -> None:
    x = np.array([448 * 2**10, 1, 3, 0.001, 5], np.float32)
    assert np.array_equal(round_to_e4m3(x, 2)[:2], [448 * 2**10, 0])  # 2^−10 is half a subnormal: to even
    assert round_to_e4m3(x, 2)[4] == 5
    assert round_to_e4m3(x, 2).shape == (5,)


def test_rounding_twice_is_rounding_once() -> None:
    x = np.random.default_rng(0).standard_normal((50, 256)).astype(np.float32)
    for once in (round_to_e4m3(x, 128), round_to_e4m3(x, 64)):
        assert np.array_equal(round_to_e4m3(once, 64), once)
    once = round_to_e2m1(x, 32)
    assert np.array_equal(round_to_e2m1(once, 32), once)


def test_hadamard_is_its_own_inverse_and_matches_the_matrix() -> None:
    x = np.random.default_rng(1).standard_normal((7, 3, 16)).astype(np.float32)
    matrix = np.array([[1.0]])
    for _ in range(4):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    np.testing.assert_allclose(hadamard(x), x @ matrix / 4, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(hadamard(hadamard(x)), x, rtol=1e-5, atol=1e-6)


def test_hadamard_refuses_other_widths() -> None:
    with pytest.raises(UnsupportedError, match="expected a power of two, got 12"):
        hadamard(np.ones((1, 12), np.float32))


@pytest.mark.parametrize(("shape", "seed"), [(0, 36), (1, 30), (2, 5)])
def test_activation_rounding_moves_the_logits_a_little(shape: int, seed: int) -> None:
    source = random_source(shape, seed)
    tokens = random_tokens(source.config, 40, seed)
    exact, rounded = Model(source).forward(tokens), Model(source, activation_rounding=True).forward(tokens)
    error = np.sqrt(np.mean((exact - rounded) ** 2, axis=1) / np.mean(exact**2, axis=1))
    assert 0.01 < np.median(error) < 0.5


class NotingParameters(Parameters):
    """Remembers which weights saw rounded inputs and which did not."""

    def __init__(self, source: WeightSource) -> None:
        super().__init__(source, activation_rounding=True)
        object.__setattr__(self, "linears", set())
        object.__setattr__(self, "projections", set())

    linears: set[str]
    projections: set[str]

    def linear(self, x: Array, name: str, seen: Array | None = None) -> Array:
        self.linears.add(name)
        return super().linear(x, name, seen)

    def project(self, x: Array, name: str) -> Array:
        self.projections.add(name)
        return super().project(x, name)


def test_inputs_are_rounded_before_every_quantised_linear_and_no_other() -> None:
    source = random_source(0, 36)
    tokens = random_tokens(source.config, 150, 36)
    model = Model(source)
    model.parameters = noted = NotingParameters(source)
    state = model.new_state()
    model.forward(tokens, state)
    assert state.streams is not None
    model.mtp(state.streams[:-1], tokens[1:])
    quantised, plain = set(), set()
    for expected in expected_tensors(source.config, Draft.MTP, 1):
        if len(expected.shape) != 2 or not source.has(expected.name):
            continue
        if expected.expert is not None and expected.name not in noted.linears:
            continue  # no token was routed there
        (quantised if expected.row.store in (Store.DENSE, Store.EXPERT) else plain).add(expected.name)
    # The published code multiplies by wo_a in BF16.
    assert noted.linears == {name for name in quantised if not name.endswith("wo_a.weight")}
    assert noted.projections <= plain


def test_kv_keeps_its_rotary_part_and_rounds_the_rest() -> None:
    source = random_source(1, 30)
    trace = dict(Model(source, activation_rounding=True).activations(random_tokens(source.config, 130, 30)))
    r = source.config.qk_rope_head_dim
    for name in ("layers.0.attn.kv", "layers.0.attn.compressor.entries", "layers.2.attn.compressor.entries"):
        kv = trace[name]
        assert np.array_equal(round_to_e4m3(kv[:, :-r], 64), kv[:, :-r]), name
        assert not np.array_equal(round_to_e4m3(kv[:, -r:], 64), kv[:, -r:]), name
    entries = trace["layers.2.attn.indexer.compressor.entries"]
    assert np.array_equal(round_to_e2m1(entries, 32), entries)


def test_e2m1_with_e4m3_scales_equals_ml_dtypes() -> None:
    x = np.random.default_rng(2).standard_normal((300, 64)).astype(np.float32) * np.float32(3)
    blocks = x.reshape(300, 4, 16)
    scale = (np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(6)).astype(ml_dtypes.float8_e4m3fn)
    expected = (blocks / scale.astype(np.float32)).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    expected *= scale.astype(np.float32)
    assert np.array_equal(round_to_e2m1_scaled_e4m3(x, 16), expected.reshape(300, 64))


def test_a_block_of_tiny_values_has_the_least_e4m3_scale() -> None:
    x = np.full((1, 16), 2.0**-9, np.float32)
    assert np.array_equal(round_to_e2m1_scaled_e4m3(x, 16), x)
    assert not round_to_e2m1_scaled_e4m3(x / 8, 16).any()


def test_v41_rounds_all_of_the_kv_and_compressed_entries_to_e2m1() -> None:
    model = load_model(TINY["tiny-a"], activation_rounding=True)
    model.parameters = noted = NotingParameters(model.source)
    trace = dict(model.activations(range(40)))
    kv = trace["layers.1.attn.kv"]
    assert np.array_equal(round_to_e4m3(kv, 32), kv)
    for layer in model.config.kv_source_layer_ids:
        keys = trace[f"layers.{layer}.attn.indexer.keys"]
        assert np.array_equal(round_to_e2m1(keys, 32), keys)
        entries = trace[f"layers.{layer}.attn.compressor.entries"]
        assert np.array_equal(round_to_e2m1_scaled_e4m3(entries, 16), entries)
    assert "layers.0.engram.wkv.weight" in noted.linears
    assert "layers.1.attn.compressor.wkv.weight" in noted.projections
