"""The Triton codecs on a GPU: checked against numpy, then timed beside a device-to-device copy of the same bytes.

python benchmarks/codecs_gpu.py --save benchmarks/results/codecs_gpu.json

Sizes are those of the source tensor, in MiB. A codec's bytes are all that it must read and write: codes,
scales, output. The copy reads half of them and writes half. Each figure is the median of CUDA event
timings, codec and copy in turns, over sets of tensors that do not fit the GPU's cache together. A short
wait on the device before each start hides the time that Python takes to launch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import triton

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dsv4convert.formats.backend import numpy_codecs  # noqa: E402
from dsv4convert.formats.base import Scratch, Tally  # noqa: E402
from dsv4convert.formats.triton import bf16 as triton_bf16  # noqa: E402
from dsv4convert.formats.triton import fp8 as triton_fp8  # noqa: E402
from dsv4convert.formats.triton import mxfp4 as triton_mxfp4  # noqa: E402
from dsv4convert.formats.triton import q8_0 as triton_q8_0  # noqa: E402
from dsv4convert.formats.triton.scalar import DeviceTally  # noqa: E402

MIB = 2**20
COLUMNS = 7168
TALL = (128, 128)
FLAT = (1, 32)
TARGETS = {"fp8_to_bf16": 0.90, "fp4_to_bf16": 0.90, "fp4_to_mxfp4": 0.75, "fp4_to_fp8": 0.75, "fp8_to_q8_0": 0.75}
TARGET_FROM_MIB = 256
# Tensors are made in enough sets to exceed the cache several times.
CACHE_EXCEEDING_BYTES = 512 * MIB
WAIT_CYCLES = 400_000
# e8m0 bytes of ordinary weights: 2^-17 to 2^-6, no further apart than keeps FP4 to FP8 lossless.
SCALE_BYTES = (110, 121)


class Codec(NamedTuple):
    """A codec with what its tensors look like: columns of codes and of output for each 32 elements."""

    name: str
    module: Any
    code_bytes: int
    block: tuple[int, int]
    out_bytes: int
    out_dtype: torch.dtype = torch.uint8
    takes_block: bool = False
    tile_scales: bool = False


CODECS = (
    Codec("fp8_to_bf16", triton_bf16, 32, TALL, 64, torch.bfloat16, takes_block=True),
    Codec("fp4_to_bf16", triton_bf16, 16, FLAT, 64, torch.bfloat16, takes_block=True),
    Codec("fp4_to_mxfp4", triton_mxfp4, 16, FLAT, 17),
    Codec("fp4_to_fp8", triton_fp8, 16, FLAT, 32, tile_scales=True),
    Codec("fp8_to_q8_0", triton_q8_0, 32, TALL, 34, takes_block=True),
)


class Tensors(NamedTuple):
    """One set of tensors of a codec."""

    codes: torch.Tensor
    scale: torch.Tensor
    outputs: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that a codec must read and write."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale, *self.outputs))


def make(codec: Codec, source_bytes: int, columns: int = COLUMNS) -> Tensors:
    """Return random codes without NaN, ordinary scales and outputs full of something else."""
    groups = columns // 32
    rows = max(1, source_bytes // (groups * codec.code_bytes))
    codes = torch.empty((rows, groups * codec.code_bytes), dtype=torch.uint8, device="cuda")
    codes.random_(0, 256)
    if codec.code_bytes == 32:
        # 0x7F and 0xFF are NaN; their neighbours are not.
        codes.sub_(((codes & 0x7F) == 0x7F).to(torch.uint8))
    shape = (-(-rows // codec.block[0]), -(-columns // codec.block[1]))
    scale = torch.empty(shape, dtype=torch.uint8, device="cuda").random_(SCALE_BYTES[0], SCALE_BYTES[1] + 1)
    out_columns = groups * codec.out_bytes // codec.out_dtype.itemsize
    outputs = [torch.full((rows, out_columns), 77, dtype=codec.out_dtype, device="cuda")]
    if codec.tile_scales:
        outputs.append(torch.full((-(-rows // 128), -(-columns // 128)), 77, dtype=torch.uint8, device="cuda"))
    return Tensors(codes, scale, tuple(outputs))


def call(codec: Codec, tensors: Tensors, tally: DeviceTally) -> None:
    """Run the codec on the device."""
    block = (codec.block,) if codec.takes_block else ()
    getattr(codec.module, codec.name)(tensors.codes, tensors.scale, *block, *tensors.outputs, None, tally)


def check_large(codec: Codec, source_bytes: int) -> int:
    """Compare rows at the start, the middle, around 2^31 elements, and the end with numpy; return the rows."""
    tensors = make(codec, source_bytes)
    tally = DeviceTally("cuda")
    call(codec, tensors, tally)
    torch.cuda.synchronize()
    rows = tensors.codes.shape[0]
    step = 128
    elements_in_row = COLUMNS
    turn = 2**31 // elements_in_row // step * step
    starts = {start for start in (0, turn - step, turn, 2 * turn, (rows - 1) // step * step) if 0 <= start < rows}
    checked = 0
    for first in sorted(starts):
        last = min(first + step, rows)
        codes = tensors.codes[first:last].cpu().numpy()
        height = codec.block[0]
        scale = tensors.scale[first // height : -(-last // height)].cpu().numpy()
        main = tensors.outputs[0][first:last]
        made = [main.view(torch.uint16).cpu().numpy() if main.dtype == torch.bfloat16 else main.cpu().numpy()]
        if codec.tile_scales:
            made.append(tensors.outputs[1][first // 128 : -(-last // 128)].cpu().numpy())
        wanted = [np.zeros_like(array) for array in made]
        block = (codec.block,) if codec.takes_block else ()
        getattr(numpy_codecs(), codec.name)(codes, scale, *block, *wanted, Scratch(), Tally())
        for one, other in zip(made, wanted, strict=True):
            if not np.array_equal(one, other):
                raise SystemExit(f"{codec.name}: rows {first}..{last} of {rows} differ from numpy")
        checked += last - first
    if tally.read() != Tally():
        raise SystemExit(f"{codec.name}: counted {tally.read()} in a sound tensor")
    return checked


def check_cases() -> None:
    """Run the cases of the tests on this device: every code, every scale byte, ragged shapes."""
    cases = [sys.executable, str(ROOT / "tests" / "formats" / "test_triton.py"), "--device", "cuda"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(cases, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    outcomes: dict[str, str | None] = dict(json.loads(line) for line in done.stdout.splitlines())
    failed = {name: failure for name, failure in outcomes.items() if failure is not None}
    for name, failure in failed.items():
        print(f"FAILED {name}: {str(failure)[:600]}")
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} cases equal to numpy on the device")
    if failed or not outcomes:
        raise SystemExit("not equal to numpy: " + ", ".join(failed))


def time_in_turns(functions: dict[str, list[Callable[[], None]]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each function; each has one variant per set of tensors, used in turns."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in functions}
    for variants in functions.values():
        for run in variants:
            run()
    torch.cuda.synchronize()
    for number in range(repeats):
        for name, variants in functions.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(WAIT_CYCLES)
            start.record()
            variants[number % len(variants)]()
            stop.record()
            events[name].append((start, stop))
    torch.cuda.synchronize()
    return {name: median(a.elapsed_time(b) for a, b in pairs) / 1e3 for name, pairs in events.items()}


def copies(nbytes: int, sets: int) -> list[Callable[[], None]]:
    """Return copies that read and write ``nbytes`` together."""
    pairs = []
    for _ in range(sets):
        source = torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda").random_(0, 256)
        pairs.append((source, torch.empty_like(source)))
    return [lambda a=a, b=b: b.copy_(a) for a, b in pairs]


def bench(codec: Codec, size_mib: int, repeats: int) -> dict[str, Any]:
    """Time one codec at one size."""
    first = make(codec, size_mib * MIB)
    nbytes = first.nbytes
    sets = max(2, -(-CACHE_EXCEEDING_BYTES // nbytes))
    tensors = [first, *(make(codec, size_mib * MIB) for _ in range(sets - 1))]
    tally = DeviceTally("cuda")
    seconds = time_in_turns(
        {
            "codec": [lambda t=t: call(codec, t, tally) for t in tensors],
            "copy": copies(nbytes, sets),
        },
        repeats,
    )
    return {
        "codec": codec.name,
        "source_mib": size_mib,
        "shape": [first.codes.shape[0], COLUMNS],
        "bytes": nbytes,
        "seconds": seconds["codec"],
        "copy_seconds": seconds["copy"],
        "tb_per_second": nbytes / seconds["codec"] / 1e12,
        "copy_tb_per_second": nbytes / seconds["copy"] / 1e12,
        "of_copy": seconds["copy"] / seconds["codec"],
        "target": TARGETS[codec.name] if size_mib >= TARGET_FROM_MIB else None,
        "sets": sets,
        "settings": {name: getattr(codec.module, name) for name in variants_of(codec)[0]},
        "repeats": repeats,
    }


def variants_of(codec: Codec) -> list[dict[str, Any]]:
    """Return settings of the codec's module to try."""
    if codec.module in (triton_mxfp4, triton_q8_0):
        shape = {"UNITS": [16, 32, 64, 128], "WARPS": [1, 2, 4, 8]}
    else:
        shape = {"TILE": [128, 256, 512, 1024], "WARPS": [1, 2, 4, 8]}
    space = shape | {"STORE_CACHE": ["", ".cs"]}
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def tune(codec: Codec, sizes: list[int], repeats: int) -> list[dict[str, Any]]:
    """Time every variant; return settings with their part of the copy's rate, best first."""
    default = {name: getattr(codec.module, name) for name in variants_of(codec)[0]}
    tally = DeviceTally("cuda")
    results: list[dict[str, Any]] = []
    data = {}
    for size in sizes:
        tensors = [make(codec, size * MIB) for _ in range(2)]
        data[size] = (tensors, copies(tensors[0].nbytes, 2))
    for variant in variants_of(codec):
        for name, value in variant.items():
            setattr(codec.module, name, value)
        parts = []
        for tensors, copy in data.values():
            runs = [lambda t=t: call(codec, t, tally) for t in tensors]
            try:
                seconds = time_in_turns({"codec": runs, "copy": copy}, repeats)
            except triton.runtime.errors.OutOfResources:
                parts.append(0.0)
                continue
            parts.append(seconds["copy"] / seconds["codec"])
        results.append({**variant, "of_copy": parts})
    for name, value in default.items():
        setattr(codec.module, name, value)
    return sorted(results, key=lambda result: -min(result["of_copy"]))


def environment(commit: str | None) -> dict[str, Any]:
    """Return hardware, versions, date and commit."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    properties = torch.cuda.get_device_properties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver and clocks": driver.stdout.strip(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit or git.stdout.strip() or None,
        "command": " ".join(["python", *sys.argv]),
    }


def main() -> None:
    """Check, time, print a table, save JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024, 2048], help="source tensors, MiB")
    parser.add_argument("--codecs", nargs="+", default=list(TARGETS))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--save", type=Path, help="write the figures here as JSON")
    parser.add_argument("--tune", type=Path, help="try the modules' settings and write the figures here as JSON")
    parser.add_argument("--tune-codecs", nargs="+", help="tune only these")
    parser.add_argument("--adopt", action="store_true", help="go on with the best settings that --tune finds")
    parser.add_argument("--tune-sizes", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--commit", help="the commit, where the checkout does not know it")
    parser.add_argument("--no-check", action="store_true")
    options = parser.parse_args()
    chosen = [codec for codec in CODECS if codec.name in options.codecs]
    about = environment(options.commit)
    print(json.dumps(about, indent=1))
    if not options.no_check:
        check_cases()
        for codec in chosen:
            rows = check_large(codec, 2048 * MIB)
            print(f"{codec.name}: {rows} rows of a 2 GiB tensor equal to numpy, among them those at 2^31 elements")
    if options.tune:
        tuned = {}
        for codec in (codec for codec in chosen if codec.name in (options.tune_codecs or options.codecs)):
            began = time.time()
            tuned[codec.name] = tune(codec, options.tune_sizes, 7)
            print(f"{codec.name}: {len(tuned[codec.name])} variants in {time.time() - began:.0f} s")
            for result in tuned[codec.name][:8]:
                print("  ", result)
            options.tune.write_text(json.dumps({"environment": about, "variants": tuned}, indent=1) + "\n")
            if options.adopt:
                for name in variants_of(codec)[0]:
                    setattr(codec.module, name, tuned[codec.name][0][name])
            torch.cuda.empty_cache()
    rows = []
    print("| codec | source MiB | bytes moved | TB/s | copy TB/s | of copy | target |")
    print("|---|---|---|---|---|---|---|")
    for codec in chosen:
        for size in options.sizes:
            row = bench(codec, size, options.repeats)
            rows.append(row)
            print(
                f"| {row['codec']} | {size} | {row['bytes'] / 1e9:.2f} GB | {row['tb_per_second']:.2f} "
                f"| {row['copy_tb_per_second']:.2f} | {row['of_copy']:.3f} | {row['target'] or ''} |",
                flush=True,
            )
            torch.cuda.empty_cache()
    if options.save:
        record = {"environment": about, "results": rows}
        options.save.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
