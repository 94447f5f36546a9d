"""Whole conversions with --device cuda beside --device cpu: the same bytes, the seconds, the peak memory.

python benchmarks/convert_cuda.py --folder /dev/shm/convert-cuda --save benchmarks/results/convert_cuda.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from side_by_side import save

from dsv4convert.synth.write import write_synth

COMMANDS = {
    "hf-to-gguf": ("hf-to-gguf", "model.gguf", []),
    "dequantize": ("dequantize", "bf16", []),
    "repack": ("repack", "fp8", ["--experts", "fp8"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/dsv4convert-cuda"))
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()

    source = arguments.folder / "source"
    if not source.is_dir():
        arguments.folder.mkdir(parents=True, exist_ok=True)
        write_synth(source, "flash", ratios=(0, 4, 128), experts=arguments.experts, vocab=8192)
    results = [compare(arguments.folder, source, name, arguments.threads) for name in COMMANDS]
    for row in results:
        print(row)
    if arguments.save is not None:
        facts = {"what": "whole conversions, cpu and cuda", "threads": arguments.threads}
        save({**facts, "results": results}, arguments.save)
    if not all(row["same_bytes"] for row in results):
        raise SystemExit("the outputs differ")


def compare(folder: Path, source: Path, name: str, threads: int) -> dict[str, Any]:
    """Run one command on both devices; return whether the checksums of all tensors agree, and what each took."""
    command, out_name, options = COMMANDS[name]
    row: dict[str, Any] = {"command": name}
    checksums = []
    for device in ("cpu", "cuda"):
        out = folder / device / out_name
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        done = subprocess.run(
            [sys.executable, "-m", "dsv4convert", command, str(source), str(out), *options, "--json",
             "--threads", str(threads), "--device", device],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stderr)
        summary = json.loads(done.stdout)
        row[device] = {
            "seconds": round(summary["seconds"], 2),
            "gigabytes_per_second": round(summary["bytes_per_second"] / 1e9, 2),
            "peak_mebibytes": round(summary["peak_memory_bytes"] / 2**20),
            "counted": len(summary["counted"]),
        }
        manifest = json.loads(out.with_name(out.name + ".manifest.json").read_text())
        checksums.append([file["checksum"] for file in manifest["files"]])
        shutil.rmtree(out.parent)
    row["same_bytes"] = checksums[0] == checksums[1]
    return row


if __name__ == "__main__":
    main()
