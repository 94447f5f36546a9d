"""hf-to-gguf into low-bit types, in alternation with ggml's quantisers alone on the same float32 elements in memory.

    python benchmarks/lowbit.py --save benchmarks/results/lowbit.json
    python benchmarks/lowbit.py --types q2_k iq2_xxs --threads 16 --times 4 --save benchmarks/results/lowbit_16.json

The checkpoint has the matrices of V4-Flash's experts, in FP4, and little else. Our time is that of the whole command:
start, headers, reading, decoding, quantising, writing, checksums. Start and end do not grow with the model, and these
runs take seconds where a model takes hours: ``made_of_library`` compares the part between, from the first byte to the
last checksum, as the command's summary tells it. The library's time is that of ``ggml_quantize_chunk`` alone, called by
as many threads on elements that were decoded before the clock starts, with the same importance, or without any
(``--no-importance``); both set up the tables of a type, which takes one thread up to eight seconds (IQ1). Each type has
as many experts as give its library some seconds of work with importance, and memory holds; the bytes of both are
compared, but for MXFP4, which is moved here and made anew by the library. The wall time is the result; next to it
stands the processor time, which other processes on the machine disturb less. A file of results that exists keeps its
other cases: types, numbers of threads, with importance or without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import Contender, circumstances, commit, compile_package, run_once, save, warm_memory

from dsv4convert.api import convert_gguf
from dsv4convert.containers.gguf import open_gguf
from dsv4convert.containers.imatrix import imatrix_file, importance, read_imatrix
from dsv4convert.formats.ggml import find_quantiser
from dsv4convert.formats.ggml_types import BY_NAME
from dsv4convert.synth.write import write_synth

SHAPE = {
    "hidden_size": 4096,
    "moe_intermediate_size": 2048,
    "q_lora_rank": 256,
    "o_lora_rank": 64,
    "num_attention_heads": 2,
    "o_groups": 2,
    "num_experts_per_tok": 1,
}
# Routed experts by type, of 25 million elements each: some eight seconds of the library's work on two processors. The
# types of the last row would take more memory for that than there is, and take it one or two seconds.
EXPERTS = {
    **dict.fromkeys(("iq2_xs", "iq3_xxs", "iq3_s"), 1),
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_s", "iq4_nl", "iq4_xs"), 3),
    **dict.fromkeys(("q4_1", "q5_1", "q2_k", "q4_k", "q5_k"), 6),
    **dict.fromkeys(("q4_0", "q5_0", "q3_k", "q6_k", "nvfp4"), 24),
    **dict.fromkeys(("q8_0", "mxfp4", "tq1_0", "tq2_0", "q1_0", "q2_0"), 24),
}
# Elements that a thread of the library takes at a time.
CHUNK_ELEMENTS = 2**20


def make_source(folder: Path, experts: int) -> Path:
    """Write the checkpoint, its F32 GGUF and an importance matrix of all its matrices, unless they are there."""
    place = folder / f"experts-{experts}"
    if place.is_dir():
        return place
    place.mkdir(parents=True)
    write_synth(place / "source", "tiny", ratios=(0,), experts=experts, vocab=384, mtp=False, overrides=SHAPE)
    convert_gguf(place / "source", place / "wide.gguf", dense="f32", experts="f32")
    random = np.random.default_rng(5)
    shapes = {
        tensor.name: (tensor.shape[0] if len(tensor.shape) > 2 else 1, tensor.shape[-1])
        for tensor in open_gguf(place / "wide.gguf").tensors.values()
        if len(tensor.shape) > 1 and tensor.name != "token_embd.weight"
    }
    file = imatrix_file(shapes, datasets=["random"], chunks=1, chunk_size=512)
    content = bytearray(file.header.ljust(file.nbytes, b"\0"))
    for name, (sums, counts) in file.places.items():
        for offset, values in (
            (sums, random.standard_normal(shapes[name]) ** 4),
            (counts, np.full(shapes[name][0], 512)),
        ):
            data = np.asarray(values, "<f4").tobytes()
            content[offset : offset + len(data)] = data
    (place / "imatrix.gguf").write_bytes(content)
    return place


class Work:
    """Rows of one matrix in memory: values, where their blocks go, and the importance of their columns."""

    def __init__(self, values: np.ndarray, out: np.ndarray, weights: np.ndarray | None) -> None:
        self.values, self.out, self.weights = values, out, weights


def library_alone(kind: str, place: Path, threads: int, ggml_lib: Path | None, with_importance: bool) -> None:
    """Quantise what ``ours.gguf`` has in ``kind``; print wall and processor seconds, and elements."""
    quantiser = find_quantiser(ggml_lib)
    ours, wide = open_gguf(place / "ours.gguf"), open_gguf(place / "wide.gguf")
    matrix = read_imatrix(place / "imatrix.gguf")
    work: list[Work] = []
    made: list[tuple[str, np.ndarray]] = []
    for tensor in ours.tensors.values():
        if tensor.type != kind:
            continue
        floats = wide.tensors[tensor.name]
        experts, (rows, columns) = tensor.shape[0] if len(tensor.shape) > 2 else 1, tensor.shape[-2:]
        values = np.fromfile(floats.file, "<f4", floats.nbytes // 4, offset=floats.offset).reshape(
            experts, rows, columns
        )
        out = np.empty((experts, rows, BY_NAME[kind].row_bytes(columns)), np.uint8)
        out[...] = 0  # the pages are there before the clock starts
        made.append((tensor.name, out))
        entry = matrix.entries[tensor.name]
        sums = np.fromfile(entry.file, "<f4", entry.values, offset=entry.offset).reshape(experts, columns)
        step = CHUNK_ELEMENTS // columns
        for expert in range(experts):
            weights = None
            if with_importance:
                weights = np.ascontiguousarray(importance(sums[expert], entry.counts[expert], entry.is_legacy))
            work += [
                Work(values[expert, a : a + step], out[expert, a : a + step], weights) for a in range(0, rows, step)
            ]
    elements = sum(piece.values.size for piece in work)
    pieces, lock = iter(work), threading.Lock()

    def run() -> None:
        while True:
            with lock:
                piece = next(pieces, None)
            if piece is None:
                return
            quantiser.quantise(kind, piece.values, piece.out, piece.weights)

    crew = [threading.Thread(target=run) for _ in range(threads)]
    started, processor = time.perf_counter(), time.process_time()
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    for name, out in made:
        tensor = ours.tensors[name]
        if kind == "mxfp4":
            continue
        stored = np.fromfile(tensor.file, np.uint8, tensor.nbytes, offset=tensor.offset)
        if not np.array_equal(stored, out.reshape(-1)):
            raise SystemExit(f"{name}: the bytes are not those of the library")
    print(json.dumps({"seconds": seconds, "processor_seconds": processor, "elements": elements}))


def measure(arguments: argparse.Namespace, kind: str, threads: int, place: Path) -> dict[str, Any]:
    """Time one type in alternation; return the record."""
    out = place / "ours.gguf"
    options = ["--dense", kind, "--experts", kind, "--json"]
    if arguments.importance:
        options += ["--imatrix", str(place / "imatrix.gguf")]
    library_option = [] if arguments.ggml_lib is None else ["--ggml-lib", str(arguments.ggml_lib)]
    command = [
        sys.executable,
        "-m",
        "dsv4convert",
        "hf-to-gguf",
        str(place / "source"),
        str(out),
        *options,
        *library_option,
    ]
    summary = place / "summary.json"
    to_summary = ["sh", "-c", 'exec "$@" > "$0"', str(summary)]
    ours = Contender("hf-to-gguf", [*to_summary, *command, "--threads", str(threads)], out)
    library = [sys.executable, __file__, "--library", kind, str(place), str(threads), *library_option]
    library += [] if arguments.importance else ["--no-importance"]
    names = ("ours", "made", "library", "ours_processor", "library_processor")
    times: dict[str, list[float]] = {name: [] for name in names}
    peak = elements = 0
    for number in range(-arguments.warmup, arguments.rounds):
        used = run_once(ours)
        made = json.loads(summary.read_text(encoding="utf-8"))["seconds"]
        found = json.loads(subprocess.run(library, check=True, stdout=subprocess.PIPE, text=True).stdout)
        elements = found["elements"]
        if number < 0:
            continue
        peak = max(peak, used.peak_bytes)
        times["ours"].append(used.seconds)
        times["made"].append(made)
        times["ours_processor"].append(used.processor_seconds)
        times["library"].append(found["seconds"])
        times["library_processor"].append(found["processor_seconds"])
    out.unlink()
    median = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "type": kind,
        "threads": threads,
        "importance": arguments.importance,
        "elements": elements,
        "commit": commit(),
        "ours_of_library": round(median["ours"] / median["library"], 3),
        "made_of_library": round(median["made"] / median["library"], 3),
        "fastest_made_of_library": round(min(times["made"]) / min(times["library"]), 3),
        "fastest_ours_of_library": round(min(times["ours"]) / min(times["library"]), 3),
        "processor_ours_of_library": round(median["ours_processor"] / median["library_processor"], 3),
        "million_elements_a_second": round(elements / median["ours"] / 1e6, 2),
        "peak_mebibytes": round(peak / 2**20),
        **{f"{name}_seconds": [round(value, 2) for value in values] for name, values in times.items()},
    }
    print(
        f"{kind:<8}{'' if arguments.importance else 'alike '} {threads} threads  {elements / 1e6:5.0f} M elements  "
        f"ours {median['ours']:6.2f} s  library {median['library']:6.2f} s  {result['ours_of_library']:.3f}  "
        f"made {result['made_of_library']:.3f}  (fastest {result['fastest_made_of_library']:.3f}, "
        f"processor {result['processor_ours_of_library']:.3f})  peak {result['peak_mebibytes']} MiB",
        flush=True,
    )
    return result


def merged(results: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Return results with those of an older file that are of other cases, in the types' order."""
    older = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []
    order = list(EXPERTS)

    def case(result: dict[str, Any]) -> tuple[int, bool, int]:
        return result["threads"], not result.get("importance", True), order.index(result["type"])

    by_case = {case(result): result for result in (*older, *results)}
    return [by_case[key] for key in sorted(by_case)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/dsv4convert-lowbit"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--types", nargs="+", choices=EXPERTS, default=list(EXPERTS))
    parser.add_argument("--times", type=int, default=1, help="multiply the experts, for more processors")
    parser.add_argument("--no-importance", dest="importance", action="store_false", help="all columns alike")
    parser.add_argument("--ggml-lib", type=Path)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--library", nargs=3, metavar=("TYPE", "FOLDER", "THREADS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.library is not None:
        kind, place, threads = arguments.library
        library_alone(kind, Path(place), int(threads), arguments.ggml_lib, arguments.importance)
        return
    compile_package()
    for kind in arguments.types:
        place = make_source(arguments.folder, EXPERTS[kind] * arguments.times)
        with warm_memory(place, (place / "wide.gguf").stat().st_size // 4):  # no type has more than a quarter of F32
            results = [measure(arguments, kind, threads, place) for threads in arguments.threads]
        if arguments.save is not None:
            facts = {
                **circumstances(),
                "ggml": find_quantiser(arguments.ggml_lib).version,
                "command": f"python benchmarks/lowbit.py --rounds {arguments.rounds} --warmup {arguments.warmup} "
                f"--times {arguments.times}",
            }
            save({**facts, "results": merged(results, arguments.save)}, arguments.save)


if __name__ == "__main__":
    main()
