"""dequantize (or repack, requantize, mlx, maxtext) on a Flash slice, next to a cp of as many bytes as it writes.

python benchmarks/dequantize.py --rounds 7 --save benchmarks/results/dequantize.json
python benchmarks/dequantize.py --command repack --experts 48 --rounds 5 --save benchmarks/results/repack.json
python benchmarks/dequantize.py --command repack-nvfp4 --experts 12 --max-file-size 1GB --rounds 5 --warmup 1 \\
    --save benchmarks/results/repack_nvfp4.json
python benchmarks/dequantize.py --command requantize --experts 12 --max-file-size 600MB --rounds 5 --warmup 1 \\
    --save benchmarks/results/requantize.json
python benchmarks/dequantize.py --command requantize --experts 32 --max-file-size 600MB --rounds 5 --warmup 1 \\
    --no-source-copy --save benchmarks/results/requantize_large.json
python benchmarks/dequantize.py --command mlx --experts 12 --max-file-size 1GB --rounds 3 --warmup 1 \\
    --save benchmarks/results/mlx.json
python benchmarks/dequantize.py --command maxtext --experts 6 --rounds 3 --warmup 1 \\
    --save benchmarks/results/maxtext.json

requantize takes the slice in BF16, and is timed next to a cp of that as well, as it reads several times what it writes;
not so with --no-source-copy, which saves the room for it.
Files have the command's own default size unless --max-file-size says otherwise. With --one-file it is also
timed with a single file, at which the threads wait for each other. Takes room for the source and one output:
12 GB for either.
"""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path

from side_by_side import (
    Contender,
    alternate,
    as_many_bytes,
    common_arguments,
    make_flash_slice,
    print_table,
    record,
    save,
)

import dsv4convert
from dsv4convert.targets.dequantize import plan_dequantize
from dsv4convert.targets.maxtext import plan_maxtext
from dsv4convert.targets.mlx import plan_mlx
from dsv4convert.targets.repack import plan_repack
from dsv4convert.targets.requantize import plan_requantize

COMMANDS = {
    "dequantize": ["dequantize"],
    "repack": ["repack", "--experts", "fp8"],
    "repack-nvfp4": ["repack", "--experts", "nvfp4"],
    "requantize": ["requantize"],
    "mlx": ["mlx"],
    "maxtext": ["maxtext"],
}
PLANS = {
    "dequantize": plan_dequantize,
    "repack": plan_repack,
    "repack-nvfp4": partial(plan_repack, experts="nvfp4"),
    "requantize": plan_requantize,
    "mlx": plan_mlx,
    "maxtext": plan_maxtext,
}


def main() -> None:
    parser = common_arguments(__doc__, "dsv4convert-bench-hf")
    parser.add_argument("--command", choices=COMMANDS, default="dequantize")
    parser.add_argument("--experts", type=int, default=24, help="routed experts a layer: the size of the slice")
    parser.add_argument("--numpy", action="store_true", help="also time the run without compiled codecs")
    parser.add_argument("--max-file-size", default="5GB", help="of the output's files; the command's own default")
    parser.add_argument("--one-file", action="store_true", help="also time the run with files of up to 50 GB")
    parser.add_argument("--no-source-copy", action="store_true", help="leave out the cp of requantize's source")
    parser.add_argument("--transformers", action="store_true", help="also time --names transformers")
    arguments = parser.parse_args()

    folder: Path = arguments.folder
    source = folder / f"flash-slice-{arguments.experts}"
    floats = arguments.command == "requantize"
    official, source = source, folder / f"{source.name}-bf16" if floats else source
    if not source.exists():
        make_flash_slice(official, arguments.experts)
        if floats:
            dsv4convert.dequantize(official, source)
            shutil.rmtree(official)

    def ours(name: str, out: str, *options: str, **environment: str) -> Contender:
        command = [sys.executable, "-m", "dsv4convert", *COMMANDS[arguments.command], str(source)]
        size = () if arguments.command == "maxtext" else ("--max-file-size", arguments.max_file_size)
        line = [*command, str(folder / out), "--quiet", "--threads", str(arguments.threads), *size, *options]
        return Contender(name, line, folder / out, environment)

    plan = PLANS[arguments.command](source, folder / "ours")
    links = as_many_bytes(source, plan.nbytes, folder / "cp-source")
    copy = folder / "copy"
    contenders = [
        Contender("cp", ["cp", "-rL", str(links), str(copy)], copy),
        ours(f"dsv4convert {arguments.command}", "ours"),
    ]
    if floats and not arguments.no_source_copy:
        contenders.insert(1, Contender("cp of the source", ["cp", "-r", str(source), str(copy)], copy))
    if arguments.transformers and arguments.command == "dequantize":
        contenders.append(ours("... --names transformers", "stacked", "--names", "transformers"))
    if arguments.one_file:
        contenders.append(ours("... one file", "one", "--max-file-size", "50GB"))
    if arguments.numpy:
        contenders.append(ours("... numpy only", "numpy", DSV4CONVERT_COMPILED="0"))
    alternate(contenders, arguments.warmup, arguments.rounds, plan.nbytes)
    shutil.rmtree(links)
    result = record(
        contenders,
        "cp",
        plan.nbytes,
        what=arguments.command,
        source_bytes=plan.source_bytes,
        output_bytes=plan.nbytes,
        threads=arguments.threads,
        max_file_size=arguments.max_file_size,
    )
    print_table(result)
    save(result, arguments.save)


if __name__ == "__main__":
    main()
