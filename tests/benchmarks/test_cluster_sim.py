"""The simulation of a cluster at its limits, where the result is known."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks" / "results" / "cluster_sim.json"
FREE = (0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def sim() -> Iterator[ModuleType]:
    """Return the benchmark, as if it were run from its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        before = set(sys.modules)
        yield importlib.import_module("cluster_sim")
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
                del sys.modules[name]


def tasks(sim: ModuleType, count: int) -> list[Any]:
    """Return tasks of many sizes."""
    return [sim.Work(3e6 * (1 + n % 7), 2e6 * (1 + n % 5), 0.01 * (1 + n % 3), 1 + n % 4) for n in range(count)]


def simulated(sim: ModuleType, files: list[list[Any]], workers: int, **given: Any) -> Any:
    """Carry tasks out without a spread; what is not given costs nothing."""
    site = sim.Site(**{"total": 1e15, "stream": 1e15, "link": 1e15, "latency": 0.0} | given.get("site", {}))
    rates = sim.Rates({}, 1.0, given.get("busy", [1]), given.get("pace", [1.0]))
    return sim.simulate(files, workers, site, sim.Costs(*given.get("costs", FREE)), rates, spread=0.0)


def test_one_worker_takes_the_sum_of_all_work(sim: ModuleType) -> None:
    work = tasks(sim, 40)
    site = {"stream": 1e8, "latency": 0.02}
    found = simulated(sim, [work[:15], work[15:]], 1, site=site, costs=(0.003, 0.0005, 0.001))
    moving = sum(task.read + task.written for task in work) / 1e8
    overhead = 40 * (0.003 + 0.001 + 0.02) + 0.0005 * sum(task.segments for task in work)
    assert found.seconds == pytest.approx(moving + overhead + sum(task.seconds for task in work))
    assert found.causes["network"] == pytest.approx(moving)
    assert found.causes["last tasks"] == found.causes["storage"] == 0


def test_equal_work_is_shared_by_all_workers(sim: ModuleType) -> None:
    work = [sim.Work(0, 0, 0.5, 1)] * 64
    assert simulated(sim, [work], 16).seconds == pytest.approx(2.0)
    assert simulated(sim, [work], 64).seconds == pytest.approx(0.5)
    assert simulated(sim, [work], 100).seconds == pytest.approx(0.5)


def test_with_everything_else_quick_the_run_limits(sim: ModuleType) -> None:
    work = [sim.Work(1, 1, 1e-9, 3)] * 500
    found = simulated(sim, [work], 300, costs=(0.004, 0.001, 0.0))
    assert found.seconds == pytest.approx(500 * (0.004 + 3 * 0.001), rel=1e-6)
    assert max(found.causes, key=found.causes.get) == "the run"


def test_the_storage_is_shared_by_all_machines(sim: ModuleType) -> None:
    work = [sim.Work(1e9, 1e9, 0.0, 1)] * 64
    found = simulated(sim, [work], 64, site={"total": 4e9, "stream": 1e9})
    assert found.seconds == pytest.approx(64 * 2e9 / 4e9)
    assert found.causes["storage"] == pytest.approx(15 * found.causes["network"])


def test_the_link_is_shared_by_the_workers_of_a_machine(sim: ModuleType) -> None:
    work = [sim.Work(1e9, 0, 0.0, 1)] * 32
    assert simulated(sim, [work], 16, site={"link": 4e9}).seconds == pytest.approx(8.0)
    assert simulated(sim, [work], 32, site={"link": 4e9}).seconds == pytest.approx(4.0)


def test_processors_are_slower_when_more_of_them_are_busy(sim: ModuleType) -> None:
    work = [sim.Work(0, 0, 3.0, 1)] * 16
    assert simulated(sim, [work], 1, busy=[1, 16], pace=[4.0, 1.0]).seconds == pytest.approx(12.0)
    assert simulated(sim, [work], 16, busy=[1, 16], pace=[4.0, 1.0]).seconds == pytest.approx(3.0)
    assert simulated(sim, [work], 6, busy=[1, 16], pace=[4.0, 1.0]).seconds == pytest.approx(2 * 3.0 / 3.0 + 3.0 / 3.4)


@pytest.mark.parametrize("workers", [1, 7, 40])
def test_all_bytes_are_moved_and_all_time_has_a_cause(sim: ModuleType, workers: int) -> None:
    files = [tasks(sim, count) for count in (1, 30, 90)]
    site = {"total": 2e9, "stream": 1e8, "link": 8e8, "latency": 0.01}
    found = simulated(sim, files, workers, site=site, costs=(0.003, 0.0005, 0.001), busy=[1, 16], pace=[2.0, 1.0])
    assert found.tasks == 121
    assert found.read == sum(task.read for file in files for task in file)
    assert found.written == sum(task.written for file in files for task in file)
    assert sum(found.causes.values()) == pytest.approx(workers * found.seconds)


def test_the_page_has_the_table_of_the_record(sim: ModuleType) -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    table = sim.table(record)
    hint = f"put in the table of: python benchmarks/cluster_sim.py --table {RECORD.relative_to(ROOT)}"
    assert table in (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8"), hint
    assert {result["target"] for result in record["results"]} == {"GGUF", "shards, mp 8", "Q2_K"}
    assert all([row["workers"] for row in result["rows"]] == list(sim.WORKERS) for result in record["results"])


def test_the_record_has_the_errors_that_the_page_gives(sim: ModuleType) -> None:
    errors = [row["error"] for row in json.loads(RECORD.read_text(encoding="utf-8"))["checked"]]
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    assert f"{100 * min(errors):.0f} % to +{100 * max(errors):.0f} %" in page
