"""Conversions on 1 to 1,024 workers, simulated: time, cost, and why more workers stop helping.

    python benchmarks/cluster_sim.py --save benchmarks/results/cluster_sim.json
    python benchmarks/cluster_sim.py --table benchmarks/results/cluster_sim.json

The tasks are those of real plans, of checkpoints with the headers of V4-Pro and V4.1, cut and given out by the engine's
own code (``engine/cluster.py``, ``engine/schedule.py``). The run, one process, gives a task to a worker; the worker
reads the task's bytes, converts them, writes them, and waits until they are durable. 16 workers are a machine: they
share its network link, in either direction, and its processors. All machines share the storage's bandwidth.

Measured (the record says where): rates of converting on a machine with 1 to 16 busy processors, the seconds of a task
and a segment, start and end of Ray, and planning, which is timed here. Assumed: ``SITES`` and the price of a machine.
The processor seconds of a task vary by ``SPREAD``, at random but reproducibly: without that, tasks of one size march in
step and want the same resource at the same time.

The real runs of the records ``REAL`` and ``TASKS`` are simulated too, and the record has the error of each.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from cluster import make_source
from side_by_side import circumstances, save

from dsv4convert.engine import cluster
from dsv4convert.engine.schedule import Lane, Schedule
from dsv4convert.formats.ggml_types import BY_NAME
from dsv4convert.plan import OutputFile, Plan, Quantise, Segment
from dsv4convert.synth.write import write_synth
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions
from dsv4convert.targets.shards import ShardOptions, plan_shards

RESULTS = Path(__file__).parent / "results"
REAL = "cluster_16core_2026-11-26.json"
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
LOW_BIT = "lowbit_16core_2026-11-26_all.json"
COPIES = "scale_16core_2026-11-26_last.json"
TASKS = "cluster_16core_2026-11-26_last.json"
PROCESSORS = 16  # of a machine
SPREAD = 0.1  # as the rounds of one command in REAL
ROW = 256  # elements; the blocks of all types divide it
# More workers pay as long as twice as many are at least so many times as fast.
WORTH_DOUBLING = 1.5


class Site(NamedTuple):
    """Bytes a second of all reads and writes together, of one worker, and of a machine's link in one direction.

    ``latency`` is the seconds of a task in which its worker waits for the storage to answer.
    """

    total: float
    stream: float
    link: float
    latency: float


LINK = 25e9 / 8
SITES = {
    "file system, 5 GB/s": Site(5e9, 1e9, LINK, 0.01),
    "file system, 50 GB/s": Site(5e10, 1e9, LINK, 0.01),
    "object store": Site(1e12, 0.8e9, LINK, 0.15),
}
MEMORY = Site(1e15, 1e12, 1e12, 0.0)


class Work(NamedTuple):
    """A task: bytes read and written, seconds of a processor of a machine whose processors are all busy, segments."""

    read: float
    written: float
    seconds: float
    segments: int


class Costs(NamedTuple):
    """Seconds that a task costs the run, each of its segments besides, and what it costs its worker."""

    task: float
    segment: float
    worker: float


class Rates(NamedTuple):
    """Rates of a processor of a machine that has ``busy[i]`` busy ones: ``pace[i]`` of those with all of them busy.

    With all busy: elements a second by low-bit type, and bytes written a second of everything else.
    """

    elements: Mapping[str, float]
    moved: float
    busy: Sequence[int]
    pace: Sequence[float]

    def seconds(self, segment: Segment) -> float:
        """Return the seconds of a processor for a segment."""
        if isinstance(segment.operation, Quantise):
            return elements(segment) / self.elements[segment.operation.target]
        return segment.nbytes / self.moved


class Simulated(NamedTuple):
    """Seconds of the work, bytes, number of tasks, and the workers' seconds by cause."""

    seconds: float
    read: float
    written: float
    tasks: int
    causes: dict[str, float]


def elements(segment: Segment) -> float:
    """Return the number of elements of a segment of a low-bit type."""
    return segment.nbytes / BY_NAME[segment.operation.target].row_bytes(ROW) * ROW  # type: ignore[union-attr]


def tasks_of(files: Sequence[OutputFile], rates: Rates, workers: int) -> list[list[Work]]:
    """Return the tasks of each file, cut as the engine cuts them."""
    segments = [[segment for tensor in file.tensors for segment in tensor.segments] for file in files]
    most = cluster.work_of_a_task(sum(cluster.work_of(segment) for file in segments for segment in file), workers)

    def task(run: Sequence[Segment]) -> Work:
        read, written = sum(map(cluster.bytes_read, run)), sum(segment.nbytes for segment in run)
        return Work(read, written, sum(map(rates.seconds, run)), len(run))

    return [[task(run) for run in cluster.cut(file, cluster.work_of, most)] for file in segments]


# What a worker does for a task, in this order; then it asks for the next, or has nothing more to do.
ASK, READ, CONVERT, WRITE, WAIT, NOTHING = range(6)


def simulate(
    files: Sequence[Sequence[Work]], workers: int, site: Site, costs: Costs, rates: Rates, spread: float = SPREAD
) -> Simulated:
    """Carry the tasks of files out, from the first one given to the last one done.

    Every worker is at one step of a task; time goes on from the end of a step to the next end of one.
    """
    random = np.random.default_rng(0)
    schedule = Schedule([iter(tasks) for tasks in files])
    lanes: list[Lane[Work] | None] = [None] * workers
    machine = np.arange(workers) // PROCESSORS
    amounts = np.zeros((workers, NOTHING + 1))  # of the task at hand: seconds or bytes
    step, left = np.full(workers, NOTHING), np.zeros(workers)
    now = free = read = written = storage = 0.0
    given, spent = 0, np.zeros(NOTHING + 1)

    def begin(worker: int) -> None:
        nonlocal free, given, read, written
        step[worker] = NOTHING
        found = schedule.next(lanes[worker])
        if found is None:
            return
        lanes[worker], task = found
        free = max(free, now) + costs.task + costs.segment * task.segments
        seconds = task.seconds * random.uniform(1 - spread, 1 + spread)
        amounts[worker] = free - now, task.read, seconds, task.written, costs.worker + site.latency, 0
        step[worker], left[worker] = ASK, free - now
        given, read, written = given + 1, read + task.read, written + task.written

    for worker in range(workers):
        begin(worker)
    while (step != NOTHING).any():
        rate = np.ones(workers)
        wanted = 0.0
        for direction in (READ, WRITE):
            here = np.flatnonzero(step == direction)
            rate[here] = np.minimum(site.stream, site.link / np.bincount(machine[here], minlength=1)[machine[here]])
            wanted += rate[here].sum()
        moving = (step == READ) | (step == WRITE)
        share = min(1.0, site.total / wanted) if wanted else 1.0
        rate[moving] *= share
        here = np.flatnonzero(step == CONVERT)
        rate[here] = np.interp(np.bincount(machine[here], minlength=1)[machine[here]], rates.busy, rates.pace)
        rate[step == NOTHING] = 0
        at_work = step != NOTHING
        seconds = (left[at_work] / rate[at_work]).min()
        now += seconds
        spent += seconds * np.bincount(step, minlength=NOTHING + 1)
        storage += seconds * (1 - share) * moving.sum()
        left -= rate * seconds
        for worker in np.flatnonzero(at_work & (left <= 1e-9 * amounts[np.arange(workers), step])):
            while step[worker] != NOTHING and left[worker] <= 1e-9 * amounts[worker, step[worker]]:
                if step[worker] == WAIT:
                    begin(worker)
                else:
                    step[worker] += 1
                    left[worker] = amounts[worker, step[worker]]
    causes = {
        "processors": spent[CONVERT],
        "network": spent[READ] + spent[WRITE] - storage,
        "storage": storage,
        "the run": spent[ASK],
        "latency": spent[WAIT],
        "last tasks": spent[NOTHING],
    }
    return Simulated(float(now), read, written, given, {name: float(cause) for name, cause in causes.items()})


def load(name: str) -> dict[str, Any]:
    """Return a record."""
    content: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return content


def median_seconds(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """Return the median of a contender of a record."""
    return float(next(row["median_seconds"] for row in rows if row["name"] == name))


def numbered(rows: Sequence[Mapping[str, Any]], what: str) -> dict[int, float]:
    """Return the medians of a record's contenders "1 threads" or "1 workers" and so on, by number."""
    names = {row["name"]: row["median_seconds"] for row in rows}
    return {int(name.split()[0]): seconds for name, seconds in names.items() if re.fullmatch(rf"\d+ {what}", name)}


def costs_of(rows: Sequence[Mapping[str, Any]]) -> Costs:
    """Return what tasks with hardly any work cost, from rows of a record.

    One worker takes the run's seconds and its own in turn; several are as fast as the run gives tasks out. With few
    tasks the processor seconds of the run are those of its segments.
    """
    most = max(row["workers"] for row in rows)
    many, *few = (row for row in rows if row["workers"] == most)
    alone = next(row for row in rows if row["workers"] == 1)
    segment = statistics.median(few[0]["run_processor_seconds"]) / few[0]["segments"] if few else 0.0
    task = statistics.median(many["seconds"]) / many["tasks"] - segment
    return Costs(task, segment, max(0.0, statistics.median(alone["seconds"]) / alone["tasks"] - segment - task))


def plan_elements(plan: Plan) -> float:
    """Return the number of elements that become a low-bit type."""
    segments = (segment for file in plan.files for tensor in file.tensors for segment in tensor.segments)
    return sum(elements(segment) for segment in segments if isinstance(segment.operation, Quantise))


def plan_experts(folder: Path, experts: int, kind: str) -> Plan:
    """Return the plan of a run of benchmarks/cluster.py."""
    return plan_gguf(make_source(folder, experts), folder / "x.gguf", GgufOptions(experts=kind))


def measured(folder: Path) -> tuple[dict[str, Rates], Costs, float, dict[str, Any]]:
    """Return rates of the 16-core machine by target, costs, seconds of Ray, and all of them with their records."""
    low = {row["type"]: row["million_elements_a_second"] * 1e6 / PROCESSORS for row in load(LOW_BIT)["results"]}
    real = load(REAL)
    (alone,) = (result for result in real["results"] if result["type"] == "iq4_nl")
    one_busy = (
        plan_elements(plan_experts(folder, alone["experts"], "iq4_nl")) / numbered(alone["results"], "threads")[1]
    )
    rates, copied = {}, {}
    for target, what in (("GGUF", "hf-to-gguf, eight files"), ("shards, mp 8", "shard --mp 8")):
        (row,) = (one for one in load(COPIES)["results"] if one["what"] == what)
        totals = {busy: row["output_bytes"] / seconds for busy, seconds in numbered(row["results"], "threads").items()}
        each = totals[PROCESSORS] / PROCESSORS
        pace = [total / busy / each for busy, total in totals.items()]
        rates[target] = Rates(low, each, list(totals), pace)
        copied[target] = {f"{busy} busy": round(total / busy / 1e6) for busy, total in totals.items()}
    rates["Q2_K"] = Rates(low, rates["GGUF"].moved, [1, PROCESSORS], [one_busy / low["iq4_nl"], 1.0])
    costs = costs_of(load(TASKS)["tasks"])
    start = median_seconds(real["results"][0]["results"], "start, 1 workers")
    return (
        rates,
        costs,
        start,
        {
            "megabytes_written_a_second_of_a_processor": {**copied, "from": COPIES},
            "million_elements_a_second_of_a_processor": {
                **{kind: round(rate / 1e6, 3) for kind, rate in low.items()},
                "with 1 busy, times": round(one_busy / low["iq4_nl"], 2),
                "from": f"{LOW_BIT}; with 1 busy IQ4_NL in {REAL}",
            },
            "milliseconds": {
                "the run, a task": round(costs.task * 1e3, 3),
                "the run, a segment": round(costs.segment * 1e3, 3),
                "the worker, a task": round(costs.worker * 1e3, 3),
                "from": TASKS,
            },
            "seconds_of_ray": {"start and end": start, "from": REAL},
        },
    )


def plans(folder: Path) -> Iterator[tuple[str, str, Plan, float]]:
    """Yield model, target, plan, and the seconds of planning."""
    for model, preset in (("V4-Pro", "pro"), ("V4.1", "v41-flash")):
        source = folder / preset
        write_synth(source, preset, headers_only=True)
        for target in ("GGUF", "shards, mp 8", "Q2_K"):
            started = time.perf_counter()
            if target == "shards, mp 8":
                plan = plan_shards(source, folder / "out", ShardOptions(mp=8)).plan
            else:
                recipe = "q2_k" if target == "Q2_K" else None
                plan = plan_gguf(source, folder / "out.gguf", GgufOptions(recipe=recipe))
            yield model, target, plan, time.perf_counter() - started


def simulate_all(folder: Path, counts: Sequence[int], price: float) -> dict[str, Any]:
    """Simulate everything; return the record."""
    rates, costs, start, inputs = measured(folder)
    results = []
    for model, target, plan, planning in plans(folder):
        files = {count: tasks_of(plan.files, rates[target], count) for count in counts}
        for name, site in SITES.items():
            rows = []
            for count in counts:
                found = simulate(files[count], count, site, costs, rates[target])
                seconds = found.seconds + start + planning
                causes = {**found.causes, "start and plan": (start + planning) * count}
                rows.append(
                    {
                        "workers": count,
                        "seconds": round(seconds, 1),
                        "dollars": round(-(-count // PROCESSORS) * seconds / 3600 * price, 2),
                        "tasks": found.tasks,
                        "share_of_workers_time": {
                            cause: round(spent / seconds / count, 3) for cause, spent in causes.items()
                        },
                    }
                )
                print(model, target, name, rows[-1], flush=True)
            results.append(
                {
                    "model": model,
                    "target": target,
                    "site": name,
                    "read_bytes": round(found.read),
                    "written_bytes": round(found.written),
                    "planning_seconds": round(planning, 1),
                    "rows": rows,
                }
            )
    sites = {name: site._asdict() for name, site in SITES.items()}
    assumed = {"sites": sites, "dollars_a_machine_hour": price, "spread": SPREAD}
    return {**circumstances(), "measured": inputs, "assumed": assumed, "results": results, "checked": check(folder)}


def check(folder: Path) -> list[dict[str, Any]]:
    """Simulate the runs of both records of Ray, from their times of threads, starts and tasks; return what comes out.

    Where there were no threads, one worker's time without its start is taken for the rate, and not simulated.
    """
    found = []
    for name in (REAL, TASKS):
        record = load(name)
        for result in record["results"]:
            kind, rows = result["type"], result["results"]
            plan = plan_experts(folder, result["experts"], kind)
            real = numbered(rows, "workers")
            known = numbered(rows, "threads") or {1: real.pop(1) - median_seconds(rows, "start, 1 workers")}
            each = {busy: plan_elements(plan) / seconds / busy for busy, seconds in known.items()}
            rate = each[max(each)]
            rates = Rates({kind: rate}, 1e9, list(each), [one / rate for one in each.values()])
            for count, came in real.items():
                work = simulate(tasks_of(plan.files, rates, count), count, MEMORY, costs_of(record["tasks"]), rates)
                seconds = work.seconds + median_seconds(rows, f"start, {count} workers")
                found.append(
                    {
                        "type": kind,
                        "experts": result["experts"],
                        "workers": count,
                        "simulated_seconds": round(seconds, 1),
                        "real_seconds": came,
                        "error": round(seconds / came - 1, 3),
                        "record": name,
                    }
                )
                print(found[-1], flush=True)
    return found


def pays_to(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return the index of the last row that twice as many workers made WORTH_DOUBLING times as fast."""
    pairs = enumerate(pairwise(rows), 1)
    return max(
        (index for index, (less, more) in pairs if less["seconds"] >= WORTH_DOUBLING * more["seconds"]), default=0
    )


def why_no_more(rows: Sequence[Mapping[str, Any]], index: int) -> str:
    """Return the cause that takes more of the workers' time, all together, when their number is doubled."""
    if index + 1 == len(rows):
        return ""
    less, more = (
        {cause: share * row["seconds"] * row["workers"] for cause, share in row["share_of_workers_time"].items()}
        for row in rows[index : index + 2]
    )
    return max(more, key=lambda cause: more[cause] - less[cause])


def duration(seconds: float) -> str:
    """Return seconds as a cell of a table."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.{1 if seconds < 10 * unit else 0}f} {name}"
    return f"{seconds:.0f} s"


def table(record: Mapping[str, Any]) -> str:
    """Return a record as the table of docs/cluster.md."""
    shown = [index for index, count in enumerate(WORKERS) if count in (1, 4, 16, 64, 256, 1024)]
    head = [f"{WORKERS[index]:,}" for index in shown]
    lines = [["", "storage", *head, "worth it up to", "then more", "cost there"], ["---"] * (5 + len(head))]
    for result in record["results"]:
        rows = result["rows"]
        cells = []
        for row in (rows[index] for index in shown):
            shares = row["share_of_workers_time"]
            cells.append(f"{duration(row['seconds'])}, {max(shares, key=shares.get)}")
        last = pays_to(rows)
        why, cost = why_no_more(rows, last), f"${rows[last]['dollars']:.2f}"
        name = f"{result['model']} to {result['target']}"
        lines.append([name, result["site"], *cells, f"{rows[last]['workers']:,}", why, cost])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=list(WORKERS))
    parser.add_argument("--price", type=float, default=0.80, help="dollars an hour of a machine")
    parser.add_argument("--table", type=Path, metavar="RECORD", help="print a record as the table of docs/cluster.md")
    parser.add_argument("--check", action="store_true", help="simulate the real runs only")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(json.loads(arguments.table.read_text(encoding="utf-8"))))
        return
    with TemporaryDirectory(prefix="dsv4convert-cluster-sim-") as folder:
        if arguments.check:
            check(Path(folder))
            return
        result = simulate_all(Path(folder), arguments.workers, arguments.price)
    save(result, arguments.save)


if __name__ == "__main__":
    main()
