"""The number of threads that a plan gets, as many as help and never more than there are processors; and memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4convert.engine import resources
from dsv4convert.engine.resources import (
    MANY_FILES_THREADS,
    ONE_FILE_THREADS,
    default_threads,
    left_by_groups,
    memory_available,
    outgrows_memory,
)
from dsv4convert.plan import COPY, OutputFile, OutputTensor, Plan, Quantise, Segment

from .plans import PLANS


def plan_of(sizes: list[int], operation: object = COPY, dtype: str = "x") -> Plan:
    files = tuple(
        OutputFile(
            f"{size}", b"", (OutputTensor("t", dtype, (size,), 0, size, (Segment(operation, (), size, 1),)),), size
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
        pytest.param(plan_of([1000] * 46), MANY_FILES_THREADS, id="more files than threads"),
        pytest.param(plan_of([1000], Quantise("f32", "q4_k", None, "lib"), "q4_k"), 64, id="low-bit types"),
        pytest.param(plan_of([]), ONE_FILE_THREADS, id="nothing"),
    ],
)
def test_a_plan_gets_as_many_threads_as_help(plan: Plan, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    assert default_threads(plan) == expected
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    assert default_threads(plan) == 2


def test_a_plan_with_low_bit_types_gets_all_processors(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = PLANS["low-bit gguf"](tiny, tmp_path)
    made = {t.dtype for t in plan.tensors() if any(isinstance(s.operation, Quantise) for s in t.segments)}
    assert made == {"q4_0", "q5_0"}
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    assert default_threads(plan) == 64


STAT = "anon 700\nfile 900\nshmem 400\ninactive_file 300\nactive_file 200"
# Of version 1: without the groups within, and with them.
STAT_1 = "cache 9\ninactive_file 3\nactive_file 2\ntotal_cache 900\ntotal_inactive_file 300\ntotal_active_file 200"


@pytest.mark.parametrize(
    ("own", "files", "left"),
    [
        ("0::/a/b", {"a/memory.max": "4096", "a/b/memory.max": "max", "memory.max": "8192"}, [4096, 8192]),
        ("0::/", {"memory.max": "4096"}, [4096]),
        ("0::/", {"memory.max": "max"}, []),
        ("0::/", {}, []),
        (
            "5:cpu,cpuacct:/a\n4:memory:/a:b\n0::/",
            {"memory/a:b/memory.limit_in_bytes": "4096", "memory/memory.limit_in_bytes": str(2**62)},
            [4096, 2**62],
        ),
        (
            "0::/a",
            {"a/memory.max": "4096", "a/memory.current": "1600", "a/memory.stat": STAT, "memory.max": "8192"},
            [4096 - (1600 - 500), 8192],
        ),
        ("0::/", {"memory.max": "1000", "memory.current": "1600", "memory.stat": STAT}, [0]),
        ("0::/", {"memory.max": "1000", "memory.current": "400", "memory.stat": STAT}, [1000]),
        ("0::/", {"memory.max": "4096", "memory.current": "1600", "memory.stat": "anon: many"}, [4096]),
        (
            "4:memory:/",
            {
                "memory/memory.limit_in_bytes": "4096",
                "memory/memory.usage_in_bytes": "1600",
                "memory/memory.stat": STAT_1,
            },
            [4096 - (1600 - 500)],
        ),
    ],
    ids=[
        *("groups", "a container", "no limit", "no files", "version 1"),
        *("in use", "all in use", "only cached", "figures that are none", "in use, version 1"),
    ],
)
def test_memory_is_what_the_control_groups_leave(
    own: str, files: dict[str, str], left: list[int], tmp_path: Path
) -> None:
    (tmp_path / "own").write_text(own + "\n")
    for name, content in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(content + "\n")
    assert list(left_by_groups(tmp_path / "own", tmp_path / "groups")) == left
    assert list(left_by_groups(tmp_path / "none", tmp_path / "groups")) == []


def test_a_plan_outgrows_memory_with_as_much_of_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "left_by_groups", lambda: [2000, 3000])
    assert memory_available() == 2000
    assert outgrows_memory(plan_of([1000, 1]))
    assert not outgrows_memory(plan_of([1000]))
