"""Choosing tokens: greedy and Gumbel-max."""

from __future__ import annotations

import numpy as np
import pytest

from dsv4convert.errors import UsageError
from dsv4convert.reference import greedy, gumbel_max


def test_greedy_takes_the_first_of_equal_logits() -> None:
    assert greedy(np.array([1, 3, 3, 2], np.float32)) == 1


def test_temperature_zero_is_greedy() -> None:
    assert gumbel_max(np.array([1, 5, 3], np.float32), 0, np.random.default_rng(0)) == 1


def test_the_same_seed_gives_the_same_tokens() -> None:
    logits = np.linspace(0, 1, 50, dtype=np.float32)
    first, second = ([gumbel_max(logits, 1.0, np.random.default_rng(7)) for _ in range(5)] for _ in range(2))
    assert first == second


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_gumbel_max_samples_the_softmax(temperature: float) -> None:
    logits = np.array([0.0, 1.0, 2.0, -1.0], np.float32)
    rng = np.random.default_rng(3)
    n = 20_000
    counts = np.bincount([gumbel_max(logits, temperature, rng) for _ in range(n)], minlength=4)
    p = np.exp(logits / temperature)
    p = p / p.sum()
    # Four standard deviations of a binomial share.
    assert (np.abs(counts / n - p) < 4 * np.sqrt(p * (1 - p) / n)).all()


@pytest.mark.parametrize("temperature", [-1.0, float("nan")])
def test_other_temperatures_are_refused(temperature: float) -> None:
    with pytest.raises(UsageError, match="temperature: expected 0 or more"):
        gumbel_max(np.zeros(3, np.float32), temperature, np.random.default_rng(0))
