"""hf-to-gguf on a Flash slice of about 4.5 GB, in alternation with cp -r and with llama.cpp's converter.

python benchmarks/hf_to_gguf.py --rounds 7 --llama-rounds 3 --save benchmarks/results/hf_to_gguf.json
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from side_by_side import Contender, alternate, common_arguments, make_flash_slice, print_table, record, save

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = common_arguments(__doc__, "dsv4convert-bench")
    parser.add_argument("--llama-rounds", type=int, default=3, help="0 leaves llama.cpp out")
    parser.add_argument("--numpy", action="store_true", help="also time the run without compiled codecs")
    arguments = parser.parse_args()

    source = arguments.folder / "flash-slice"
    make_flash_slice(source)
    source_bytes = sum(path.stat().st_size for path in source.iterdir())
    ours = [
        sys.executable,
        "-m",
        "dsv4convert",
        "hf-to-gguf",
        str(source),
        "{}",
        "--quiet",
        "--threads",
        str(arguments.threads),
    ]
    contenders = [
        Contender("cp -r", ["cp", "-r", str(source), str(arguments.folder / "copy")], arguments.folder / "copy"),
        _ours("dsv4convert", ours, arguments.folder / "ours"),
        # The default leaves the MTP layer out, as llama.cpp's converter does; this one converts every byte.
        _ours("dsv4convert --draft split", [*ours, "--draft", "split"], arguments.folder / "split"),
    ]
    if arguments.numpy:
        contenders.append(_ours("dsv4convert, numpy only", ours, arguments.folder / "numpy", DSV4CONVERT_COMPILED="0"))
    if arguments.llama_rounds:
        out = arguments.folder / "llama.gguf"
        command = [sys.executable, "-m", "tests.oracles.llama_cpp", str(source), "--outfile", str(out)]
        contenders.append(
            Contender(
                "llama.cpp converter",
                command,
                out,
                {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
                arguments.llama_rounds,
            )
        )
    alternate(contenders, arguments.warmup, arguments.rounds, source_bytes)
    result = record(
        contenders,
        "cp -r",
        source_bytes,
        what="hf-to-gguf",
        source_bytes=source_bytes,
        threads=arguments.threads,
        storage="tmpfs" if str(arguments.folder).startswith("/dev/shm") else str(os.stat(arguments.folder).st_dev),
    )
    for row in result["results"]:
        if row["name"] == "llama.cpp converter":
            row["command"] = "convert_hf_to_gguf.py flash-slice --outfile llama.gguf"
    print_table(result)
    save(result, arguments.save)


def _ours(name: str, command: list[str], out: Path, **environment: str) -> Contender:
    return Contender(
        name, [part.format(out / "model.gguf") for part in command], out, environment, makes_folder_first=True
    )


if __name__ == "__main__":
    main()
