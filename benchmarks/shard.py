"""shard on a Flash slice of about 4.5 GB, in alternation with a cp of as many bytes as the shards hold.

python benchmarks/shard.py --rounds 7 --save benchmarks/results/shard.json
python benchmarks/shard.py --rounds 7 --experts fp8 --save benchmarks/results/shard_fp8.json
"""

from __future__ import annotations

import shutil
import sys
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

from dsv4convert.targets.shard_tensors import ShardOptions
from dsv4convert.targets.shards import plan_shards

FULL_SLICE = 48  # as in the other benchmarks of conversions


def main() -> None:
    parser = common_arguments(__doc__, "dsv4convert-bench")
    parser.add_argument("--mp", type=int, default=8)
    parser.add_argument("--experts", choices=("fp4", "fp8"), default="fp4")
    parser.add_argument(
        "--slice-experts", type=int, default=FULL_SLICE, help="routed experts a layer: the size of the slice"
    )
    arguments = parser.parse_args()

    slice_experts = arguments.slice_experts
    source: Path = arguments.folder / ("flash-slice" if slice_experts == FULL_SLICE else f"flash-slice-{slice_experts}")
    make_flash_slice(source, slice_experts)
    options = ShardOptions(arguments.mp, experts=arguments.experts)
    plan = plan_shards(source, arguments.folder / "shards", options).plan
    links = as_many_bytes(source, plan.nbytes, arguments.folder / "cp-source")
    copy = arguments.folder / "copy"
    mp, threads = str(arguments.mp), str(arguments.threads)

    def ours(command: str, what: Path, out: str, *options: str) -> Contender:
        # A folder around the output, so that the manifest beside it goes with it.
        target = arguments.folder / "ours"
        line = [sys.executable, "-m", "dsv4convert", command, str(what), str(target / out), "--quiet"]
        name = " ".join(["dsv4convert", command, *options])
        return Contender(name, [*line, "--threads", threads, *options], target, makes_folder_first=True)

    contenders = [
        Contender("cp", ["cp", "-rL", str(links), str(copy)], copy),
        ours("shard", source, "shards", "--mp", mp, "--experts", arguments.experts),
    ]
    alternate(contenders, arguments.warmup, arguments.rounds, plan.nbytes)
    result = record(
        contenders,
        "cp",
        plan.nbytes,
        what="shard",
        source_bytes=plan.source_bytes,
        shard_bytes=plan.nbytes,
        mp=arguments.mp,
        expert_dtype=arguments.experts,
        threads=arguments.threads,
    )
    print_table(result)
    shutil.rmtree(links)
    save(result, arguments.save)


if __name__ == "__main__":
    main()
