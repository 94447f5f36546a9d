"""check on a Flash slice, in alternation with cat of the same files to /dev/null.

python benchmarks/check.py --rounds 7 --save benchmarks/results/check.json

Takes room for the slice: 4.5 GB with the default of 48 experts a layer. What counts is the ratio to cat.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from side_by_side import Contender, alternate, print_table, record, save

from dsv4convert.synth.write import write_synth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/dsv4convert-bench-check"))
    parser.add_argument("--experts", type=int, default=48, help="routed experts a layer: the size of the slice")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()

    folder: Path = arguments.folder
    source = folder / f"flash-slice-{arguments.experts}"
    if not source.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        write_synth(source, "flash", ratios=(0, 4, 128, 4), experts=arguments.experts, vocab=32768)
    files = sorted(source.glob("*.safetensors"))
    nbytes = sum(path.stat().st_size for path in files)
    threads = ("--threads", str(arguments.threads))
    contenders = [
        Contender("cat", ["sh", "-c", 'cat "$@" > /dev/null', "cat", *map(str, files)], folder / "nothing"),
        Contender(
            "dsv4convert check",
            [sys.executable, "-m", "dsv4convert", "check", str(source), "--quiet", *threads],
            folder / "nothing",
        ),
    ]
    alternate(contenders, arguments.warmup, arguments.rounds, nbytes)
    result = record(contenders, "cat", nbytes, what="check", source_bytes=nbytes, threads=arguments.threads)
    print_table(result)
    if arguments.save is not None:
        save(result, arguments.save)


if __name__ == "__main__":
    main()
