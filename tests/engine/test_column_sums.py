"""Sums that several workers take together."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dsv4convert.engine.column_sums import ColumnSums, SharedSums

PARTS = 40


def test_the_order_of_adding_does_not_depend_on_who_took_a_part() -> None:
    """Values of which no two orders of adding have the same sum, and later parts that are ready first."""
    random = np.random.default_rng(2)
    parts = random.standard_normal((PARTS, 8)) * 10.0 ** random.integers(-12, 12, (PARTS, 8))
    expected = np.float64(0)
    for part in parts:
        expected = expected + part
    taken: list[int] = []
    first_may_end = threading.Event()

    def take(part: int) -> np.ndarray:
        taken.append(part)
        if part == PARTS - 1:
            first_may_end.set()
        if part == 0:
            assert first_may_end.wait(10)
        return parts[part]

    sums = ColumnSums(PARTS)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: sums.get(take, lambda: False), range(4)))
    assert sorted(taken) == list(range(PARTS))
    for result in results:
        assert result.tobytes() == expected.astype(np.float32).tobytes()
    assert parts[::-1].sum(axis=0).tobytes() != expected.tobytes()


def test_a_worker_that_fails_keeps_no_other_waiting() -> None:
    stopped = threading.Event()
    sums = ColumnSums(2)
    is_in_the_second = threading.Event()

    def take(part: int) -> np.ndarray:
        if part == 0:
            assert is_in_the_second.wait(10)
            raise ValueError("the first part")
        is_in_the_second.set()
        return np.ones(3)

    def work() -> None:
        try:
            sums.get(take, stopped.is_set)
        except ValueError:
            stopped.set()
            raise

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(work) for _ in range(2)]
        errors = [future.exception(timeout=10) for future in futures]
    assert sorted(map(str, errors)) == ["None", "the first part"]


def test_sums_are_shared_as_long_as_a_worker_has_them() -> None:
    shared = SharedSums()
    mine = shared.of("matrix", 1)
    assert shared.of("matrix", 1) is mine
    assert shared.of("another", 1) is not mine
    mine.get(lambda part: np.ones(1), lambda: False)
    del mine
    with pytest.raises(AssertionError, match="taken again"):
        shared.of("matrix", 1).get(_taken_again, lambda: False)


def _taken_again(part: int) -> np.ndarray:
    raise AssertionError("taken again")
