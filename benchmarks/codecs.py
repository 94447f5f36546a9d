"""Codecs on one thread and one cached tile: numpy and compiled against obvious numpy, torch and a copy.

python benchmarks/codecs.py --json benchmarks/results/codecs.json
python benchmarks/codecs.py --baseline ../before --json benchmarks/results/codecs.json

The tile is the engine's: 512 KiB of FP8 or packed FP4, and as many elements of the floats as of FP8.
``--baseline`` times the compiled codecs of another checkout as well, those that it has, in the same process.
All contenders of a conversion are checked to give the same bytes, then timed in turn, a round each; the
table shows medians. The rounds are spread over several sets of buffers (``--placements``): the pages that a
buffer lies in decide what it competes with for the cache, which is worth several per cent to either side.
"copy" is np.copyto of the output's bytes from one cached buffer to another. Speeds are output bytes per second.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from side_by_side import circumstances, commit

from dsv4convert.formats.backend import (
    COMPILED,
    Codecs,
    compiled_available,
    compiled_codecs,
    describe_codecs,
    numpy_codecs,
)
from dsv4convert.formats.base import Scratch, Tally

Array = np.ndarray[Any, Any]
Contender = Callable[[], Array]

FP8_BLOCK = (128, 128)
GROUP = 32
PACKAGES = ("numpy", "torch", "ml_dtypes")
BASELINE = "baseline"


@dataclass
class Case:
    """One conversion: our codec's name and arguments, and the other ways to the same bytes."""

    name: str
    inputs: list[Any]
    outputs: list[Array]
    source_bytes: int
    others: dict[str, Contender]
    seconds: dict[str, list[float]] = field(default_factory=dict)


def weights(rows: int, columns: int) -> dict[str, Array]:
    """Tiles with the statistics of trained weights: normal values, quantised the published way."""
    from dsv4convert.formats.e2m1 import quantise_fp4
    from dsv4convert.formats.e4m3 import quantise_fp8

    x = (np.random.default_rng(0).standard_normal((rows, columns)) * 0.02).astype(np.float32)
    fp8, fp8_scale = quantise_fp8(x, FP8_BLOCK)
    fp4, fp4_scale = quantise_fp4(x)
    bf16 = (x.view(np.uint32) >> 16).astype(np.uint16)
    return {
        "x": x,
        "fp8": fp8,
        "fp8_scale": fp8_scale,
        "fp4": fp4,
        "fp4_scale": fp4_scale,
        "bf16": bf16,
        "f16": x.astype(np.float16),
    }


def spread(scale: Array, block: tuple[int, int], shape: tuple[int, ...]) -> Array:
    values = scale.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    return values.repeat(block[0], axis=0).repeat(block[1], axis=1)[: shape[0], : shape[1]]


FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def plain_fp8(w: dict[str, Array]) -> Array:
    return w["fp8"].view(ml_dtypes.float8_e4m3fn).astype(np.float32) * spread(w["fp8_scale"], FP8_BLOCK, w["fp8"].shape)


def plain_fp4(w: dict[str, Array]) -> Array:
    codes = np.stack([w["fp4"] & 15, w["fp4"] >> 4], axis=-1).reshape(w["x"].shape)
    return FP4_VALUES[codes] * spread(w["fp4_scale"], (1, GROUP), codes.shape)


def plain_bf16(values: Array) -> Array:
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)


def plain_mxfp4(w: dict[str, Array]) -> Array:
    """Unpack, stack, regroup."""
    rows, groups = w["fp4_scale"].shape
    codes = np.stack([w["fp4"] & 15, w["fp4"] >> 4], axis=-1).reshape(rows, groups, 2, GROUP // 2)
    packed = codes[:, :, 0] | (codes[:, :, 1] << 4)
    return np.concatenate([w["fp4_scale"][..., None], packed], axis=-1).reshape(rows, -1)


def plain_q8_0(values: Array) -> Array:
    x = values.reshape(-1, GROUP)
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(d == 0, np.float32(0), np.float32(1) / d)
    scaled = x * inverse
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    q = np.sign(scaled) * (whole + np.floor(2 * (magnitude - whole)))
    blocks = np.concatenate([d.astype(np.float16).view(np.uint8), q.astype(np.int8).view(np.uint8)], axis=1)
    return blocks.reshape(values.shape[0], -1)


def plain_fp4_to_fp8(w: dict[str, Array]) -> Array:
    rows, columns = w["x"].shape
    down, across = -(-rows // FP8_BLOCK[0]), -(-columns // FP8_BLOCK[1])
    tile = w["fp4_scale"].reshape(down, -1, across, FP8_BLOCK[1] // GROUP).max(axis=(1, 3)) - 6
    ratio = spread(w["fp4_scale"], (1, GROUP), (rows, columns)) / spread(tile, FP8_BLOCK, (rows, columns))
    codes = np.stack([w["fp4"] & 15, w["fp4"] >> 4], axis=-1).reshape(rows, columns)
    return (FP4_VALUES[codes] * ratio).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def torch_fp8(w: dict[str, Array], dtype: torch.dtype) -> Contender:
    """The cast, times the scale."""
    rows, columns = w["fp8"].shape
    weight = torch.from_numpy(w["fp8"]).view(torch.float8_e4m3fn)
    scale = torch.from_numpy(w["fp8_scale"]).view(torch.float8_e8m0fnu)

    def run() -> Array:
        wide = weight.to(dtype).view(rows // FP8_BLOCK[0], FP8_BLOCK[0], columns // FP8_BLOCK[1], FP8_BLOCK[1])
        product = (wide * scale.to(dtype)[:, None, :, None]).view(rows, columns)
        return product.view(torch.uint16).numpy() if dtype == torch.bfloat16 else product.numpy()

    return run


def torch_fp4(w: dict[str, Array], dtype: torch.dtype) -> Contender:
    """A table lookup, as the published convert script does it, times the scale."""
    rows, columns = w["x"].shape
    packed = torch.from_numpy(w["fp4"])
    scale = torch.from_numpy(w["fp4_scale"]).view(torch.float8_e8m0fnu)
    table = torch.from_numpy(FP4_VALUES).to(dtype)

    def run() -> Array:
        low, high = table[(packed & 15).long()], table[(packed >> 4).long()]
        wide = torch.stack([low, high], dim=-1).view(rows, columns // GROUP, GROUP)
        product = (wide * scale.to(dtype)[:, :, None]).view(rows, columns)
        return product.view(torch.uint16).numpy() if dtype == torch.bfloat16 else product.numpy()

    return run


def cases(rows: int, columns: int) -> list[Case]:
    # A byte holds two FP4 codes: twice the columns make the same tile.
    fp8_and_floats, fp4 = _cases(rows, columns), _cases(rows, 2 * columns)
    return [b if b.name.startswith("fp4") else a for a, b in zip(fp8_and_floats, fp4, strict=True)]


def _cases(rows: int, columns: int) -> list[Case]:
    w = weights(rows, columns)
    fp8 = [w["fp8"], w["fp8_scale"], FP8_BLOCK]
    fp4 = [w["fp4"], w["fp4_scale"], (1, GROUP)]
    tiles = (-(-rows // FP8_BLOCK[0]), -(-columns // FP8_BLOCK[1]))
    shapes: dict[str, list[tuple[tuple[int, int], Any]]] = {
        "f32": [((rows, columns), np.float32)],
        "bf16": [((rows, columns), np.uint16)],
        "f16": [((rows, columns), np.float16)],
        "fp8": [((rows, columns), np.uint8), (tiles, np.uint8)],
        "mxfp4": [((rows, columns // GROUP * 17), np.uint8)],
        "q8_0": [((rows, columns // GROUP * 34), np.uint8)],
    }
    bf16, f32 = torch.bfloat16, torch.float32
    wide = torch.from_numpy(w["x"])
    narrow = torch.from_numpy(w["bf16"]).view(bf16)
    plan: list[tuple[str, list[Any], dict[str, Contender]]] = [
        ("fp8_to_bf16", fp8, {"obvious": lambda: plain_bf16(plain_fp8(w)), "torch": torch_fp8(w, bf16)}),
        ("fp4_to_bf16", fp4, {"obvious": lambda: plain_bf16(plain_fp4(w)), "torch": torch_fp4(w, bf16)}),
        ("fp4_to_mxfp4", fp4[:2], {"obvious": lambda: plain_mxfp4(w)}),
        ("fp8_to_q8_0", fp8, {"obvious": lambda: plain_q8_0(plain_fp8(w))}),
        ("fp8_to_mxfp4", fp8, {}),
        ("fp4_to_fp8", fp4[:2], {"obvious": lambda: plain_fp4_to_fp8(w)}),
        ("fp8_to_f32", fp8, {"obvious": lambda: plain_fp8(w), "torch": torch_fp8(w, f32)}),
        ("fp4_to_f32", fp4, {"obvious": lambda: plain_fp4(w), "torch": torch_fp4(w, f32)}),
        ("fp8_to_f16", fp8, {"obvious": lambda: plain_fp8(w).astype(np.float16)}),
        ("fp4_to_f16", fp4, {"obvious": lambda: plain_fp4(w).astype(np.float16)}),
        ("fp4_to_q8_0", fp4, {"obvious": lambda: plain_q8_0(plain_fp4(w))}),
        ("f32_to_q8_0", [w["x"]], {"obvious": lambda: plain_q8_0(w["x"])}),
        (
            "bf16_to_q8_0",
            [w["bf16"]],
            {"obvious": lambda: plain_q8_0(w["bf16"].view(ml_dtypes.bfloat16).astype(np.float32))},
        ),
        ("f32_to_mxfp4", [w["x"]], {}),
        ("bf16_to_mxfp4", [w["bf16"]], {}),
        ("f32_to_f16", [w["x"]], {"obvious": lambda: w["x"].astype(np.float16)}),
        ("bf16_to_f16", [w["bf16"]], {}),
        ("f16_to_f32", [w["f16"]], {"obvious": lambda: w["f16"].astype(np.float32)}),
        ("f16_to_bf16", [w["f16"]], {}),
        (
            "f32_to_bf16",
            [w["x"]],
            {"obvious": lambda: plain_bf16(w["x"]), "torch": lambda: wide.to(bf16).view(torch.uint16).numpy()},
        ),
        (
            "bf16_to_f32",
            [w["bf16"]],
            {
                "obvious": lambda: w["bf16"].view(ml_dtypes.bfloat16).astype(np.float32),
                "torch": lambda: narrow.to(f32).numpy(),
            },
        ),
    ]
    result = []
    for name, inputs, others in plan:
        outputs = [np.zeros(shape, dtype) for shape, dtype in shapes[name.split("_to_")[1]]]
        read = sum(a.nbytes for a in inputs if isinstance(a, np.ndarray))
        result.append(Case(name, inputs, outputs, read, others))
    return result


def same_bytes(name: str, who: str, got: Array, want: Array) -> None:
    if not np.array_equal(got.view(f"u{got.dtype.itemsize}"), want.view(f"u{want.dtype.itemsize}")):
        raise SystemExit(f"{name}: {who} gives other bytes than numpy; nothing was timed")


def measure(case: Case, backends: dict[str, Codecs], rounds: int, placements: int) -> None:
    """Time all contenders of a case ``rounds`` times, in buffers at ``placements`` places of the memory in turn."""
    case.seconds = {}
    kept = []
    for _ in range(placements):
        kept.append((case.inputs, case.outputs))  # not freed, or the next would lie in the same pages
        case.inputs = [a.copy() if isinstance(a, np.ndarray) else a for a in case.inputs]
        case.outputs = [a.copy() for a in case.outputs]
        _measure_here(case, backends, rounds // placements)


def _measure_here(case: Case, backends: dict[str, Codecs], rounds: int) -> None:
    contenders = {who: _ours(codecs, case) for who, codecs in backends.items() if hasattr(codecs, case.name)}
    contenders.update(case.others)
    want = contenders["numpy"]().copy()
    for who, run in contenders.items():
        same_bytes(case.name, who, run(), want)
    target = np.empty_like(want)
    contenders["copy"] = lambda: np.copyto(target, want)  # type: ignore[assignment,return-value]
    for run in contenders.values():
        run()
    for _ in range(rounds):
        for who, run in contenders.items():
            run()  # the tile, the tables and the code are back in the cache after the others' turn
            started = time.perf_counter()
            run()
            case.seconds.setdefault(who, []).append(time.perf_counter() - started)


def baseline_codecs(checkout: Path) -> Codecs:
    """Return the compiled codecs of another checkout of this project, loaded beside ours."""
    checkout = checkout.resolve()
    ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "dsv4convert"}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(checkout))
    try:
        backend = importlib.import_module("dsv4convert.formats.backend")
        theirs: Codecs = backend.compiled_codecs()
    finally:
        sys.path.remove(str(checkout))
        for name in [name for name in sys.modules if name.partition(".")[0] == "dsv4convert"]:
            del sys.modules[name]
        sys.modules.update(ours)
    if theirs.name != COMPILED or not Path(str(backend.__file__)).is_relative_to(checkout):
        raise SystemExit(f"{checkout}: has no compiled codecs")
    return theirs


def _ours(codecs: Codecs, case: Case) -> Contender:
    function, scratch, tally = getattr(codecs, case.name), Scratch(), Tally()

    def run() -> Array:
        function(*case.inputs, *case.outputs, scratch, tally)
        return case.outputs[0]

    return run


COLUMNS = ("copy", BASELINE, "compiled", "numpy", "obvious", "torch")


def print_table(done: list[Case]) -> None:
    print(f"{'GB/s of output':16}" + "".join(f"{who:>10}" for who in COLUMNS), end="")
    print("   numpy is / compiled is (times as fast as)")
    for case in done:
        middle = {who: statistics.median(seconds) for who, seconds in case.seconds.items()}
        size = case.outputs[0].nbytes
        line = f"{case.name:16}"
        for who in COLUMNS:
            line += f"{size / middle[who] / 1e9:10.2f}" if who in middle else f"{'':10}"
        for who in ("obvious", "torch", "copy", BASELINE):
            if who in middle:
                ratios = [f"{middle[who] / middle[us]:.2f}" for us in ("numpy", "compiled") if us in middle]
                line += f"   {who} {' / '.join(ratios)}"
        print(line)


def as_json(done: list[Case], arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", "benchmarks/codecs.py", *sys.argv[1:]]),
        **circumstances(),
        **({"baseline_commit": commit(arguments.baseline)} if arguments.baseline else {}),
        "codecs": describe_codecs(),
        "packages": {name: version(name) for name in PACKAGES},
        "rounds": arguments.rounds,
        "placements": arguments.placements,
        "threads": 1,
        "load_average": os.getloadavg()[0],
        "results": [
            {
                "name": case.name,
                "source_shape": list(case.inputs[0].shape),
                "source_bytes": case.source_bytes,
                "output_bytes": case.outputs[0].nbytes,
                "median_microseconds": {
                    who: round(statistics.median(seconds) * 1e6, 1) for who, seconds in case.seconds.items()
                },
                "gigabytes_per_second": {
                    who: round(case.outputs[0].nbytes / statistics.median(seconds) / 1e9, 2)
                    for who, seconds in case.seconds.items()
                },
            }
            for case in done
        ],
    }


# Without these, glibc gives the obvious formulations' temporaries back to the system after every use and
# gets them again page by page; they would lose several times over to the memory, not to us.
MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


def main() -> None:
    if any(os.environ.get(name) != value for name, value in MEMORY.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MEMORY})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128, help="a multiple of 128")
    parser.add_argument("--columns", type=int, default=4096, help="of FP8, a multiple of 128")
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--placements", type=int, default=7, help="sets of buffers that the rounds are spread over")
    parser.add_argument("--only", help="conversions whose name contains this")
    parser.add_argument("--baseline", type=Path, metavar="CHECKOUT", help="also time this checkout's compiled codecs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    backends = {"numpy": numpy_codecs()}
    if compiled_available():
        backends[COMPILED] = compiled_codecs()
    if arguments.baseline:
        backends[BASELINE] = baseline_codecs(arguments.baseline)
    chosen = [c for c in cases(arguments.rows, arguments.columns) if not arguments.only or arguments.only in c.name]
    for case in chosen:
        measure(case, backends, arguments.rounds, arguments.placements)
    print_table(chosen)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(as_json(chosen, arguments), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
