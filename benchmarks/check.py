"""check on a Flash slice, in alternation with cat of the same files to /dev/null.

python benchmarks/check.py --rounds 7 --save benchmarks/results/check.json

Takes room for the slice: 4.5 GB with the default of 48 experts a layer. What counts is the ratio to cat.
"""

from __future__ import annotations

import sys
from pathlib import Path

from side_by_side import Contender, alternate, common_arguments, make_flash_slice, print_table, record, save


def main() -> None:
    parser = common_arguments(__doc__, "dsv4convert-bench-check", warmup=1)
    parser.add_argument("--experts", type=int, default=48, help="routed experts a layer: the size of the slice")
    arguments = parser.parse_args()

    folder: Path = arguments.folder
    source = folder / f"flash-slice-{arguments.experts}"
    make_flash_slice(source, arguments.experts)
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
    save(result, arguments.save)


if __name__ == "__main__":
    main()
