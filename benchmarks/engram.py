"""hf-to-gguf of an n-gram table in every encoding, in alternation with cp of the source and of as many bytes.

python benchmarks/engram.py --gib 8 --rounds 5 --save benchmarks/results/engram.json

The source is V4.1 with one layer and one table of published width. Takes room for the source, a copy of its bytes by
links, and one output of up to twice the table.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from side_by_side import Contender, alternate, as_many_bytes, common_arguments, print_table, record, save

from dsv4convert.synth.write import write_synth
from dsv4convert.targets.engram_tables import ENGRAM_TYPES
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions

# A published row: 256 codes and 8 scales.
ROW = {"engram_head_dim": 256, "engram_n_heads": 8, "engram_max_ngram_size": 4}
ROW_BYTES = 256 + 8


def main() -> None:
    parser = common_arguments(__doc__, "dsv4convert-bench-engram", rounds=5, warmup=1)
    parser.add_argument("--gib", type=float, default=8, help="size of the table, scales included")
    parser.add_argument("--encodings", nargs="+", choices=ENGRAM_TYPES, default=ENGRAM_TYPES)
    arguments = parser.parse_args()

    folder: Path = arguments.folder
    source = folder / f"table-{arguments.gib:g}"
    if not source.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        rows = round(arguments.gib * 2**30 / ROW_BYTES)
        write_synth(source, "v41-tiny", layers=1, mtp=False, experts=2, engram_rows=rows, files=1, overrides=ROW)
    results = []
    for encoding in arguments.encodings:
        plan = plan_gguf(source, folder / "ours.gguf", GgufOptions(engram=encoding))
        links = as_many_bytes(source, plan.nbytes, folder / "cp-source")
        command = [sys.executable, "-m", "dsv4convert", "hf-to-gguf", str(source), str(folder / "ours.gguf")]
        options = ["--quiet", "--threads", str(arguments.threads), "--engram", encoding]
        contenders = [
            Contender("cp of the source", ["cp", "-r", str(source), str(folder / "copy")], folder / "copy"),
            Contender("cp of as many bytes", ["cp", "-rL", str(links), str(folder / "copy")], folder / "copy"),
            Contender(f"--engram {encoding}", [*command, *options], folder / "ours.gguf"),
        ]
        alternate(contenders, arguments.warmup, arguments.rounds, max(plan.nbytes, plan.source_bytes))
        shutil.rmtree(links)
        result = record(
            contenders,
            "cp of the source",
            plan.nbytes,
            what=f"engram {encoding}",
            source_bytes=plan.source_bytes,
            output_bytes=plan.nbytes,
            threads=arguments.threads,
        )
        print_table(result)
        results.append(result)
    save({"what": "engram", "runs": results}, arguments.save)


if __name__ == "__main__":
    main()
