"""The numpy forward pass on a slice of Flash or V4.1-Flash at full width: seconds per layer, and peak memory.

python benchmarks/forward.py --save benchmarks/results/forward.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from dsv4convert.engine.run import peak_memory_bytes
from dsv4convert.synth.write import write_synth

RATIOS = (0, 4, 128, 4)
EXPERTS = 48
VOCAB = 32768
# V4.1-Flash's first four layers hold an n-gram table and a KV source; the table is cut to 2.4 million rows.
V41_LAYERS = 4
V41_TABLE = {"engram_vocab_size": 100_000}


def child(source: Path, length: int) -> None:
    """Run the model once in this process and print what it took, as JSON."""
    import numpy as np

    from dsv4convert.reference import Model
    from dsv4convert.reference.weights.open import open_source

    started = time.perf_counter()
    model = Model(open_source(source))
    marks: list[tuple[str, float]] = [("open", time.perf_counter())]

    def record(name: str, _value: object) -> None:
        if name.endswith(("attn.streams", "ffn.streams")) or name in ("embed", "logits"):
            marks.append((name, time.perf_counter()))

    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, length)
    model.forward(tokens, record=record)
    seconds = {}
    before = started
    for name, at in marks:
        seconds[name] = at - before
        before = at
    print(json.dumps({"seconds": seconds, "total": before - started, "peak_bytes": peak_memory_bytes()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/dsv4convert-bench"))
    parser.add_argument("--source", type=Path, help="a model that is there already, in any layout")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--experts", type=int, default=EXPERTS)
    parser.add_argument("--v41", action="store_true", help="a slice of V4.1-Flash")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # The slice of 48 experts is the one that the other benchmarks convert.
    name = "v41-flash-slice" if arguments.v41 else "flash-slice"
    name = name if arguments.experts == EXPERTS else f"{name}-{arguments.experts}"
    source = arguments.source or arguments.folder / name
    if arguments.child:
        child(source, arguments.tokens)
        return
    if not source.exists():
        arguments.folder.mkdir(parents=True, exist_ok=True)
        if arguments.v41:
            cut = {"layers": V41_LAYERS, "mtp": False, "overrides": V41_TABLE}
            write_synth(source, "v41-flash", experts=arguments.experts, vocab=VOCAB, **cut)
        else:
            write_synth(source, "flash", ratios=RATIOS, experts=arguments.experts, vocab=VOCAB)
    command = [
        sys.executable, __file__, "--child", "--source", str(source), "--tokens", str(arguments.tokens),
    ]  # fmt: skip
    rounds = []
    for _ in range(arguments.rounds):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rounds.append(json.loads(done.stdout))
    seconds = {name: median(r["seconds"][name] for r in rounds) for name in rounds[0]["seconds"]}
    result = {
        "command": f"python benchmarks/forward.py --experts {arguments.experts} --tokens {arguments.tokens}"
        + (" --v41" if arguments.v41 else ""),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "rounds": arguments.rounds,
        "median_seconds": seconds,
        "median_total_seconds": median(r["total"] for r in rounds),
        "peak_bytes": max(r["peak_bytes"] for r in rounds),
    }
    for name, value in seconds.items():
        print(f"{name:<24} {value:8.3f} s")
    print(f"{'total':<24} {result['median_total_seconds']:8.3f} s")
    print(f"peak memory {result['peak_bytes'] / 2**20:.0f} MiB")
    if arguments.save is not None:
        arguments.save.parent.mkdir(parents=True, exist_ok=True)
        arguments.save.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
