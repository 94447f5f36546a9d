"""hf-to-gguf into a low-bit type by workers of a local Ray cluster and by threads, in alternation.

    python benchmarks/cluster.py --workers 1 4 --threads 1 4 16 --save benchmarks/results/cluster.json

The checkpoint has the matrices of V4-Flash's experts and little else. Times are those of whole commands: with workers
the start and the end of Ray too, which the contenders called "start" show alone, on a checkpoint of some megabytes. A
job that takes one worker minutes, where they count for little, is --experts 60 --workers 4 1 --rounds 1 --no-starts.
Figures are medians; the bytes of all outputs are compared. A record that exists keeps its other types and its tasks.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash
from lowbit import SHAPE
from side_by_side import Contender, circumstances, compile_package, remove, run_once, save

from dsv4convert.engine import cluster
from dsv4convert.engine.cluster import Cluster
from dsv4convert.engine.cluster_bridge import Submit
from dsv4convert.engine.conversion import execute
from dsv4convert.synth.write import write_synth
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions


def make_source(folder: Path, experts: int) -> Path:
    """Write the checkpoint, unless it is there."""
    source = folder / f"experts-{experts}"
    if not source.is_dir():
        write_synth(source, "tiny", ratios=(0,), experts=experts, vocab=384, mtp=False, overrides=SHAPE)
    return source


def contender(name: str, source: Path, kind: str, out: Path, options: list[str]) -> Contender:
    """Return a conversion of the experts into a type."""
    line = [sys.executable, "-m", "dsv4convert", "hf-to-gguf", str(source), str(out / "model.gguf"), "--quiet"]
    return Contender(name, [*line, "--experts", kind, *options], out, makes_folder_first=True)


def digest(file: Path) -> str:
    """Return the xxh3-128 of a file."""
    found = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(2**24):
            found.update(block)
    return found.hexdigest()


def measure(kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time all contenders for one type; return the record."""
    folder: Path = arguments.folder
    source, small = make_source(folder, arguments.experts), folder / "small"
    if not small.is_dir():
        write_synth(small, "tiny")
    library = ["--ggml-lib", str(arguments.ggml_lib)] if arguments.ggml_lib is not None else []
    starts, works = [], []
    for workers in arguments.workers:
        options = ["--workers", f"ray:{workers}", *library]
        works.append(contender(f"{workers} workers", source, kind, folder / "out", options))
        if not arguments.no_starts:
            starts.append(contender(f"start, {workers} workers", small, "mxfp4", folder / "out", options[:2]))
    for threads in arguments.threads:
        options = ["--threads", str(threads), *library]
        works.append(contender(f"{threads} threads", source, kind, folder / "out", options))
    digests, nbytes = set(), 0
    for _ in range(arguments.rounds):
        for one in (*starts, *works):
            one.note(run_once(one))
            if one in works:
                made = one.output / "model.gguf"
                digests.add(digest(made))
                nbytes = made.stat().st_size
            print(f"{kind}  {one.name:<20} {one.seconds[-1]:7.2f} s", flush=True)
            remove(one.output)
    if len(digests) != 1:
        raise SystemExit(f"{kind}: the outputs differ: {sorted(digests)}")
    seconds = {one.name: statistics.median(one.seconds) for one in (*starts, *works)}
    whole = {count: seconds[f"{count} workers"] for count in sorted(arguments.workers)}
    least, *more = whole
    worked = {count: whole[count] - seconds.get(f"start, {count} workers", 0) for count in whole}
    return {
        "type": kind,
        **circumstances(),
        "ray": version("ray"),
        "experts": arguments.experts,
        "source_bytes": sum(path.stat().st_size for path in source.glob("*.safetensors")),
        "output_bytes": nbytes,
        "outputs_equal": True,
        "speedup": {
            f"{workers} workers": {
                "whole command": round(whole[least] / whole[workers], 2),
                **({"without start": round(worked[least] / worked[workers], 2)} if starts else {}),
            }
            for workers in more
        },
        "results": [
            {
                "name": one.name,
                "median_seconds": round(statistics.median(one.seconds), 2),
                "seconds": [round(second, 2) for second in one.seconds],
            }
            for one in (*starts, *works)
        ],
    }


def measure_tasks(folder: Path, workers: int) -> list[dict[str, Any]]:
    """Time tasks with hardly any work, on a cluster that runs already: what a task and a segment cost besides it.

    First each segment is a task, then the same segments are 40 tasks.
    """
    source = folder / "many"
    if not source.is_dir():
        write_synth(source, "tiny", experts=60)
    plan = plan_gguf(source, folder / "many.gguf", GgufOptions())
    segments = [segment for file in plan.files for tensor in file.tensors for segment in tensor.segments]
    limits = cluster.LEAST_WORK, cluster.MOST_WORK
    rows = []
    with Cluster(f"ray:{workers}") as joined:
        joined.connect()
        submit, given = joined.send, 0

        def counted(task: Submit) -> None:
            nonlocal given
            given += 1
            submit(task)

        joined.send = counted  # type: ignore[method-assign]
        for work in (1, sum(map(cluster.work_of, segments)) // 40):
            cluster.LEAST_WORK = cluster.MOST_WORK = work
            seconds, processor_seconds = [], []
            for _ in range(3):
                plan, given = plan_gguf(source, folder / "many.gguf", GgufOptions()), 0
                started, used = time.perf_counter(), time.process_time()
                execute(plan, cluster=joined, overwrite=True)
                seconds.append(round(time.perf_counter() - started, 3))
                processor_seconds.append(round(time.process_time() - used, 3))
            counts = {"workers": workers, "segments": len(segments), "tasks": given}
            rows.append({**counts, "seconds": seconds, "run_processor_seconds": processor_seconds})
    cluster.LEAST_WORK, cluster.MOST_WORK = limits
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/dsv4convert-cluster"))
    parser.add_argument("--types", nargs="*", default=["q4_k", "iq4_nl"])
    parser.add_argument("--experts", type=int, default=8, help="of the checkpoint, of 25 million elements each")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--no-starts", action="store_true", help="do not time start and end of Ray alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ggml-lib", type=Path)
    parser.add_argument("--tasks", action="store_true", help="measure what a task costs besides its work")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    compile_package()
    kept: dict[str, Any] = {"results": [], "tasks": []}
    if arguments.save is not None and arguments.save.exists():
        kept = json.loads(arguments.save.read_text(encoding="utf-8"))

    def keep() -> None:
        save({**kept, **circumstances(), "ray": version("ray")}, arguments.save)

    if arguments.tasks:
        kept["tasks"] = [row for workers in arguments.workers for row in measure_tasks(arguments.folder, workers)]
        print(json.dumps(kept["tasks"]), flush=True)
        keep()
    for kind in arguments.types:
        result = measure(kind, arguments)
        print(json.dumps(result["speedup"]))
        kept["results"] = [*(one for one in kept["results"] if one["type"] != kind), result]
        keep()
    shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
