"""llama.cpp on this machine against the estimate: five layers of Flash at full width, experts of several types.

    python benchmarks/estimate_llama_cpp.py --prepare
    python benchmarks/estimate_llama_cpp.py --save benchmarks/results/estimate_llama_cpp.json
    python benchmarks/estimate_llama_cpp.py --table benchmarks/results/estimate_llama_cpp.json

The machine's file is made of what is measured on it, and of nothing that its runs of the model say: bytes that all
threads read in a second, FLOPs of a product in BF16, the weights that ggml's dot products decode, and the time of an
operator's nodes, from a model so small that nothing else takes time. These stand for a maker's rates; how much of them
is reached is the default of processors. Other programs and other guests of the machine only ever slow it: everything is
the best of some rounds, and what is measured in the pauses between the runs is the median of their bests.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import circumstances, save

import dsv4convert
from dsv4convert.estimation.hardware import Hardware, parse_hardware
from dsv4convert.estimation.timing import Machine, timed
from dsv4convert.formats.ggml_types import GGML_TYPES
from dsv4convert.synth.write import write_synth

LAYERS, EXPERTS, VOCAB = 5, 8, 8192
RECIPES = ("mxfp4-q8", "q4_k_m", "q2_k", "iq2_xxs")
PROMPT, ANSWER = 256, 24
ROUNDS = 20
# Elements of a row whose dot product is timed: its bytes stay in the second level of the cache.
ROW = 2**18
# Rows of activations that ggml's repacked kernels multiply with one decoding of the weights.
TILE = 4


def prepare(folder: Path) -> None:
    """Make the models, unless they are there: the large ones in every recipe, and a small one."""
    folder.mkdir(parents=True, exist_ok=True)
    source, matrix = folder / "checkpoint", folder / "importance.gguf"
    if not source.is_dir():
        ratios = (0, 0, 4, 128, 4)
        write_synth(source, "flash", ratios=ratios, experts=EXPERTS, vocab=VOCAB, mtp=False)
        write_synth(folder / "small", "tiny", mtp=False)
    write_importance(matrix)
    for recipe in (*RECIPES, "small"):
        target = folder / f"{recipe}.gguf"
        if not target.is_file():
            options = [] if recipe == "small" else ["--recipe", recipe]
            options += ["--imatrix", str(matrix)] if recipe.startswith("iq") else []
            folder_of = folder / "small" if recipe == "small" else source
            command = [sys.executable, "-m", "dsv4convert", "hf-to-gguf", str(folder_of), str(target), *options]
            subprocess.run([*command, "--quiet"], check=True)


def write_importance(path: Path) -> None:
    """Write an importance matrix that weighs all columns alike: how fast a type is does not depend on its values."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "", use_temp_file=False)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for layer in range(LAYERS):
        for name, columns in (("gate", 4096), ("up", 4096), ("down", 2048)):
            tensor = f"blk.{layer}.ffn_{name}_exps.weight"
            writer.add_tensor(f"{tensor}.in_sum2", np.ones((EXPERTS, columns), np.float32))
            writer.add_tensor(f"{tensor}.counts", np.ones((EXPERTS, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- the machine --------------------------------------------------------------------------------------


def best(action: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Return the seconds of the quickest of some runs."""
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        found.append(time.perf_counter() - started)
    return min(found)


class CpuTraits(ctypes.Structure):
    """ggml's functions of a type, as libggml-cpu declares them."""

    _fields_ = (
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    )


VEC_DOT = ctypes.CFUNCTYPE(
    None,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
)


def decoded_a_core() -> dict[str, float]:
    """Return the weights of every ggml type that a dot product of llama.cpp's library decodes in a second."""
    import llama_cpp

    libraries = Path(llama_cpp.__file__).parent / "lib"
    base = ctypes.CDLL(str(libraries / "libggml-base.so"))
    cpu = ctypes.CDLL(str(libraries / "libggml-cpu.so"))
    cpu.ggml_cpu_init()
    cpu.ggml_get_type_traits_cpu.restype = ctypes.POINTER(CpuTraits)
    base.ggml_row_size.restype = ctypes.c_size_t
    base.ggml_row_size.argtypes = (ctypes.c_int, ctypes.c_int64)
    found = {}
    for number, kind in GGML_TYPES.items():
        traits = cpu.ggml_get_type_traits_cpu(number).contents
        if not traits.vec_dot:
            continue
        dot = VEC_DOT(traits.vec_dot)
        weights = np.zeros(base.ggml_row_size(number, ROW), np.uint8)
        other = np.zeros(base.ggml_row_size(traits.vec_dot_type, ROW), np.uint8)
        result = ctypes.c_float()
        seconds = best(lambda: dot(ROW, ctypes.addressof(result), 0, weights.ctypes.data, 0, other.ctypes.data, 0, 1))  # noqa: B023
        found[kind.name] = float(f"{ROW / seconds:.3g}")
    return found


def rates(threads: int) -> dict[str, float]:
    """Return the bytes that all threads together read in a second, and the FLOPs of their products in BF16."""
    import torch

    torch.set_num_threads(threads)
    numbers = torch.ones(2**26, dtype=torch.int64)
    matrix = torch.randn(2048, 2048).to(torch.bfloat16)
    return {
        "read_bytes_a_second": numbers.nbytes / best(numbers.sum),
        "bf16_flops": 2 * 2048**3 / best(lambda: matrix @ matrix),
    }


def machine_file(found: dict[str, Any], threads: int) -> str:
    """Return the machine's TOML."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = [
        f'description = "this machine, {threads} threads"',
        'kind = "cpu"',
        f"memory = {memory}",
        f"bandwidth = {found['read_bytes_a_second']:.3g}",
        f"bf16 = {found['bf16_flops']:.3g}",
        f"kernel_seconds = {found['kernel_seconds']:.3g}",
        "link_bandwidth = 1e9",
        "link_latency = 1e-6",
        f"decoded_tile = {TILE}",
        "[decoded]",
        *(f"{kind} = {rate * threads:.3g}" for kind, rate in found["decoded_a_core"].items()),
    ]
    return "\n".join(lines) + "\n"


# ---- the runs -----------------------------------------------------------------------------------------


def run(path: Path, threads: int) -> dict[str, float]:
    """Return the seconds of a prompt and the median of those of a token after it, in a process of their own."""
    command = [sys.executable, __file__, "--child", str(path), "--threads", str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def child(path: Path, threads: int) -> None:
    """Run the model in this process and print what it took, as JSON."""
    from llama_cpp import Llama

    both = {"n_threads": threads, "n_threads_batch": threads}
    model = Llama(str(path), n_ctx=1024, n_batch=512, n_ubatch=512, use_mmap=False, verbose=False, **both)
    tokens = np.random.default_rng(0).integers(10, model.n_vocab(), PROMPT).tolist()
    model.eval(tokens)  # a warm-up
    prompts, answers = [], []
    for _ in range(5):
        model.reset()
        started = time.perf_counter()
        model.eval(tokens)
        prompts.append(time.perf_counter() - started)
        answer = []
        for token in range(ANSWER):
            started = time.perf_counter()
            model.eval([token + 20])
            answer.append(time.perf_counter() - started)
        answers.append(statistics.median(answer))
    print(json.dumps({"prefill_seconds": min(prompts), "decode_seconds": min(answers)}))


def estimated(path: Path, hardware: Hardware) -> tuple[float, float]:
    """Return the tokens a second of a prompt and of the tokens after it, as ``estimate`` says."""
    found = dsv4convert.estimate(path, context=PROMPT)
    config = found.subject.config
    machine = Machine(hardware, 1, 1, is_gguf=True)
    prefill, decode = (timed(phase, config, machine) for phase in (found.prefill, found.decode))
    return prefill.tokens_per_second, decode.tokens_per_second


def table(path: Path) -> list[str]:
    """Return a record as a Markdown table."""
    lines = ["| experts' recipe | phase | measured | estimated | error |", "|---|---|---:|---:|---:|"]
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        error = round(100 * (row["estimated"] / row["measured"] - 1))
        figures = f"{row['measured']:.1f} | {row['estimated']:.1f} | {error:+d} %"
        lines.append(f"| {row['recipe']} | {row['phase']} | {figures} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp/dsv4convert-estimate"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prepare", action="store_true", help="make the models, which takes minutes, and end")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--table", type=Path, metavar="RECORD", help="print a record as a Markdown table, and end")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(args.child, args.threads)
        return
    if args.table is not None:
        print("\n".join(table(args.table)))
        return
    prepare(args.folder)
    if args.prepare:
        return
    small = args.folder / "small.gguf"
    operators = len(dsv4convert.estimate(small, context=PROMPT).decode.operators)
    seen, runs = [rates(args.threads)], {}
    for recipe in RECIPES:
        runs[recipe] = run(args.folder / f"{recipe}.gguf", args.threads)
        seen.append(rates(args.threads))
    found: dict[str, Any] = {key: statistics.median(rate[key] for rate in seen) for key in seen[0]}
    found["kernel_seconds"] = run(small, args.threads)["decode_seconds"] / operators
    found["decoded_a_core"] = decoded_a_core()
    text = machine_file(found, args.threads)
    hardware = parse_hardware("own", text.encode(), "own")
    rows = []
    for recipe, took in runs.items():
        measured = PROMPT / took["prefill_seconds"], 1 / took["decode_seconds"]
        says = estimated(args.folder / f"{recipe}.gguf", hardware)
        for phase, was, is_said in zip(("prefill", "decode"), measured, says, strict=True):
            rows.append({"recipe": recipe, "phase": phase, "measured": was, "estimated": is_said})
            print(f"{recipe:10} {phase:8} {was:7.2f} tokens/s, estimated {is_said:7.2f} ({is_said / was - 1:+.0%})")
    if args.save is not None:
        save({**circumstances(), "rates": seen, "machine": text, "rows": rows}, args.save)


if __name__ == "__main__":
    main()
