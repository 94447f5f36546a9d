"""mend on a Flash slice, with every file shared and with every file written, in turn with a cp of the folder.

python benchmarks/mend.py --rounds 5 --save benchmarks/results/mend.json

Takes room for the source and two outputs: 7 GB.
"""

from __future__ import annotations

import sys
from pathlib import Path

from side_by_side import Contender, alternate, common_arguments, make_flash_slice, print_table, record, save


def main() -> None:
    parser = common_arguments(__doc__, "dsv4convert-bench-mend")
    parser.add_argument("--experts", type=int, default=24, help="routed experts a layer: the size of the slice")
    arguments = parser.parse_args()

    folder: Path = arguments.folder
    source = folder / f"flash-slice-{arguments.experts}"
    make_flash_slice(source, arguments.experts)
    nbytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))

    def ours(name: str, out: str, *options: str) -> Contender:
        command = [sys.executable, "-m", "dsv4convert", "mend", str(source), str(folder / out), *options]
        return Contender(name, [*command, "--quiet", "--threads", str(arguments.threads)], folder / out)

    contenders = [
        Contender("cp", ["cp", "-r", str(source), str(folder / "copy")], folder / "copy"),
        ours("dsv4convert mend --reindex (all shared)", "shared", "--reindex"),
        ours("... --rename transformers (all written)", "written", "--rename", "transformers"),
    ]
    alternate(contenders, arguments.warmup, arguments.rounds, nbytes)
    result = record(contenders, "cp", nbytes, what="mend", source_bytes=nbytes, threads=arguments.threads)
    print_table(result)
    save(result, arguments.save)


if __name__ == "__main__":
    main()
