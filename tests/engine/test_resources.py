"""The number of threads that a plan gets: as many as help, never more than there are processors."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4convert.engine.resources import MANY_FILES_THREADS, ONE_FILE_THREADS, default_threads
from dsv4convert.plan import COPY, OutputFile, OutputTensor, Plan, Quantise, Segment


def plan_of(sizes: list[int], operation: object = COPY) -> Plan:
    files = tuple(
        OutputFile(
            f"{size}", b"", (OutputTensor("t", "x", (size,), 0, size, (Segment(operation, (), size, 1),)),), size
        )  # type: ignore[arg-type]
        for size in sizes
    )
    return Plan("x", Path(), Path(), True, files, (), {}, 0)


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        pytest.param(plan_of([1000]), ONE_FILE_THREADS, id="one file"),
        pytest.param(plan_of([1000, 10, 10, 10]), ONE_FILE_THREADS, id="one file and its small companions"),
        pytest.param(plan_of([1000, 900]), MANY_FILES_THREADS, id="two files"),
        pytest.param(plan_of([1000], Quantise("f32", "q4_k", None, "lib")), 64, id="low-bit types"),
        pytest.param(plan_of([]), ONE_FILE_THREADS, id="nothing"),
    ],
)
def test_a_plan_gets_as_many_threads_as_help(plan: Plan, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    assert default_threads(plan) == expected
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    assert default_threads(plan) == 2
