"""Each converting command with 1 to all threads, beside one and many processes of cp for the same bytes and files.

    python benchmarks/scale.py --folder /dev/shm/scale --save benchmarks/results/scale.json
    sudo python benchmarks/scale.py --folder /var/tmp/scale --cold

The output of a first run is what cp copies: into as many files, by one process or by one for each file. Rounds of all
contenders alternate; figures are medians. With --cold, nothing is in the page cache before, and everything is on the
disk at the end, as a conversion leaves it: cp is followed by sync.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from side_by_side import Contender, alternate, circumstances, make_flash_slice, record, run_once, save

# Name: command, options, and whether the output is a folder of its own.
COMMANDS = {
    "hf-to-gguf, one file": ("hf-to-gguf", [], "model.gguf"),
    "hf-to-gguf, eight files": ("hf-to-gguf", ["--max-file-size", "600M"], "model.gguf"),
    "shard --mp 8": ("shard", ["--mp", "8"], "shards"),
    "dequantize": ("dequantize", ["--max-file-size", "1500M"], "bf16"),
    "repack": ("repack", ["--experts", "fp8", "--max-file-size", "900M"], "fp8"),
}


def ours(source: Path, target: Path, what: str, threads: int | None, cold: bool = False) -> Contender:
    """Return a command with so many threads, None for its default; a folder around its output goes with it."""
    command, options, name = COMMANDS[what]
    line = [sys.executable, "-m", "dsv4convert", command, str(source), str(target / name), "--quiet", *options]
    if threads is not None:
        line += ["--threads", str(threads)]
    return Contender(f"{threads or 'default'} threads", line, target, makes_folder_first=True, cold=cold)


def copies(kept: Path, target: Path, processes: int, cold: bool = False) -> Contender:
    """Return cp of a finished output, by so many processes, a file at a time."""
    line = f"find '{kept}' -type f -print0 | xargs -0 -P {processes} -I% cp % '{target}'"
    if cold:
        line += f"; sync '{target}'/*"
    return Contender(f"cp, {processes} at once", ["sh", "-c", line], target, makes_folder_first=True, cold=cold)


def measure(
    what: str, source: Path, folder: Path, threads: list[int], rounds: int, alone: int, cold: bool
) -> dict[str, Any]:
    """Time one command with each number of threads; return the record. ``alone`` are the rounds of one at a time."""
    kept = ours(source, folder / "kept", what, max(threads))
    run_once(kept)
    files = [path for path in (folder / "kept").rglob("*") if path.is_file()]
    nbytes = sum(path.stat().st_size for path in files)
    parallel = copies(folder / "kept", folder / "copy", max(threads), cold)
    contenders = [parallel, *(ours(source, folder / "ours", what, number, cold) for number in [*threads, None])]
    if alone:
        contenders.insert(0, copies(folder / "kept", folder / "copy", 1, cold))
        contenders[0].rounds = alone
    for contender, number in zip(contenders[-len(threads) - 1 :], threads, strict=False):
        contender.rounds = alone if number == 1 else None
    alternate(contenders, 0 if cold else 1, rounds, nbytes, say=lambda line: None)
    result = record(contenders, parallel.name, nbytes, what=what, cold=cold, files=len(files), output_bytes=nbytes)
    shutil.rmtree(folder / "kept")
    print(f"\n{what}: {len(files)} files, {nbytes / 1e9:.2f} GB")
    for row in result["results"]:
        print(
            f"  {row['name']:<16} {row['median_seconds']:6.2f} s  {row['processor_seconds']:6.2f} s processor  "
            f"{row['gigabytes_per_second']:6.2f} GB/s  {row['relative']:5.2f} of the parallel cp  "
            f"{row['peak_mebibytes']} MiB",
            flush=True,
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/dsv4convert-scale"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--rounds-alone", type=int, help="of one thread and one process of cp, the slowest; as the others; 0: no cp"
    )
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--threads", type=int, nargs="+")
    parser.add_argument("--experts", type=int, default=48, help="of a layer of the source: 4.5 GB with 48")
    parser.add_argument("--layers", type=int, default=4, help="of the source")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    most = len(os.sched_getaffinity(0))
    threads = arguments.threads or [number for number in (1, 2, 4, 8, 16, 32) if number <= most]
    source = arguments.folder / "flash-slice"
    make_flash_slice(source, arguments.experts, arguments.layers)
    results = []
    for what in arguments.commands:
        alone = arguments.rounds if arguments.rounds_alone is None else arguments.rounds_alone
        results.append(measure(what, source, arguments.folder, threads, arguments.rounds, alone, arguments.cold))
        save({**circumstances(), "results": results}, arguments.save)


if __name__ == "__main__":
    main()
