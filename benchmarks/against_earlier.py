"""Converting commands of this checkout beside those of an earlier one, with one thread and more.

    git worktree add --detach ../earlier COMMIT
    python benchmarks/against_earlier.py ../earlier --save benchmarks/results/against_earlier.json

Packages that only the earlier one needs are found in --packages. Only options are used that both have. Rounds of all
contenders alternate; figures are medians.
"""

from __future__ import annotations

import argparse
import compileall
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from side_by_side import (
    Contender,
    alternate,
    circumstances,
    commit,
    make_flash_slice,
    print_table,
    record,
    run_once,
    save,
)

# Options, and whether the output is a folder of its own.
COMMANDS = {
    "hf-to-gguf": ([], "model.gguf"),
    "shard": (["--mp", "2"], "shards"),
    "dequantize": ([], "bf16"),
    "repack": (["--experts", "fp8"], "fp8"),
}


def contender(name: str, packages: str, source: Path, target: Path, command: str, threads: int) -> Contender:
    """Return a command of the program that is first on the path ``packages``."""
    options, output = COMMANDS[command]
    line = [sys.executable, "-m", "dsv4convert", command, str(source), str(target / output), *options]
    line += ["--threads", str(threads)]
    return Contender(f"{name}, {threads} threads", line, target, environment(packages), makes_folder_first=True)


def environment(packages: str) -> dict[str, str]:
    """Return what makes Python find the program on the path ``packages``, and not in the current folder first."""
    return {"PYTHONPATH": packages, "PYTHONSAFEPATH": "1"}


def check_program(packages: str) -> None:
    """End unless the program that a contender runs is that of the checkout that is first on its path."""
    line = [sys.executable, "-c", "import dsv4convert; print(dsv4convert.__file__)"]
    variables = {**os.environ, **environment(packages)}
    found = subprocess.run(line, env=variables, capture_output=True, text=True, check=True).stdout.strip()
    if not found.startswith(packages.split(os.pathsep)[0] + os.sep):
        raise SystemExit(f"{found} would run for {packages}: needs Python 3.11")


def measure(
    programs: dict[str, str], source: Path, folder: Path, command: str, threads: list[int], rounds: int
) -> dict[str, Any]:
    """Time a command of each program with each number of threads; return the record."""
    contenders = [
        contender(name, packages, source, folder / "output", command, number)
        for number in threads
        for name, packages in programs.items()
    ]
    run_once(contenders[-1])
    nbytes = sum(path.stat().st_size for path in (folder / "output").rglob("*") if path.is_file())
    alternate(contenders, 1, rounds, nbytes, say=lambda line: None)
    return record(contenders, contenders[-2].name, nbytes, what=command, output_bytes=nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("earlier", type=Path, help="checkout of an earlier commit")
    parser.add_argument("--packages", type=Path, help="folder with packages that only the earlier one needs")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/dsv4convert-against"))
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, len(os.sched_getaffinity(0))])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--experts", type=int, default=2, help="of a layer of the source: 1.4 GB with 2")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    paths = [str(path.resolve()) for path in (arguments.earlier, arguments.packages) if path is not None]
    for path in paths:
        compileall.compile_dir(path, quiet=2, maxlevels=4)
    earlier = commit(arguments.earlier)
    programs = {earlier: os.pathsep.join(paths), "now": str(Path(__file__).resolve().parents[1])}
    for packages in programs.values():
        check_program(packages)
    source = arguments.folder / "flash-slice"
    make_flash_slice(source, arguments.experts)
    results = []
    for command in arguments.commands:
        results.append(measure(programs, source, arguments.folder, command, arguments.threads, arguments.rounds))
        print(f"\n{command}", end="")
        print_table(results[-1])
        save({**circumstances(), "earlier": earlier, "results": results}, arguments.save)


if __name__ == "__main__":
    main()
