"""Conversions in less memory than the model takes, next to a file that others keep in the page cache; root only.

    sudo python benchmarks/large.py --folder /var/tmp/large --memory-mib 1024

Everything runs in a memory cgroup, whose limit counts the page cache too. A file of a quarter of the limit is read
twice, as programs next to a conversion do with theirs; the figure at the end of a line is how much of it is still there
when the command has ended. cp is followed by sync, since a conversion leaves its output on the disk.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from scale import COMMANDS, copies, ours
from side_by_side import Contender, circumstances, make_flash_slice, record, remove, run_once, save

CGROUPS = Path("/sys/fs/cgroup")
READS = 2  # a page that is read again counts as one in use


@contextlib.contextmanager
def limited(nbytes: int) -> Iterator[Path]:
    """Yield the file that takes processes into a memory cgroup with a limit, of either version."""
    version_1 = CGROUPS / "memory"
    group = (version_1 if version_1.is_dir() else CGROUPS) / "dsv4convert-large"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if version_1.is_dir() else "memory.max")).write_text(str(nbytes))
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def within(members: Path, contender: Contender) -> Contender:
    """Return the contender with its process in a cgroup."""
    contender.command = ["sh", "-c", f'echo $$ > "{members}" && exec "$@"', "sh", *contender.command]
    return contender


def resident_share(path: Path) -> float:
    """Return how much of a file is in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        found = ctypes.create_string_buffer(pages)
        start = ctypes.c_char.from_buffer(mapped)
        if libc.mincore(ctypes.addressof(start), len(mapped), found):
            raise OSError(ctypes.get_errno(), "mincore")
        del start
    return sum(byte & 1 for byte in found.raw[:pages]) / pages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp/dsv4convert-large"))
    parser.add_argument("--memory-mib", type=int, default=1024)
    parser.add_argument("--command", choices=COMMANDS, default="hf-to-gguf, one file")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    folder, what, memory = arguments.folder, arguments.command, arguments.memory_mib * 2**20
    source, kept, neighbour = folder / "flash-slice", folder / "kept", folder / "neighbour"
    make_flash_slice(source)
    neighbour.write_bytes(os.urandom(memory // 4))
    run_once(ours(source, kept, what, len(os.sched_getaffinity(0))))
    nbytes = sum(path.stat().st_size for path in kept.rglob("*") if path.is_file())
    with limited(memory) as members:
        contenders = [copies(kept, folder / "copy", 1, cold=True)]
        contenders += [ours(source, folder / "ours", what, number, cold=True) for number in arguments.threads]
        left: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        for contender in contenders:
            contender.cold = False  # the caches are emptied here, before the neighbour is read
            within(members, contender)
        for _ in range(arguments.rounds):
            for contender in contenders:
                os.sync()
                Path("/proc/sys/vm/drop_caches").write_text("1")
                reading = f'echo $$ > "{members}" && cat' + f' "{neighbour}"' * READS
                subprocess.run(["sh", "-c", reading], check=True, stdout=subprocess.DEVNULL)
                contender.note(run_once(contender))
                left[contender.name].append(round(resident_share(neighbour), 3))
                remove(contender.output)
    result = record(contenders, contenders[0].name, nbytes, what=what, memory_bytes=memory, neighbour_left=left)
    print(f"{what}: {nbytes / 1e9:.2f} GB in {memory / 2**30:.2f} GiB")
    for row in result["results"]:
        print(
            f"  {row['name']:<16} {row['median_seconds']:6.2f} s  {row['relative']:5.2f} of cp  "
            f"{row['peak_mebibytes']} MiB  neighbour left: {left[row['name']]}"
        )
    save({**circumstances(), "results": [result]}, arguments.save)


if __name__ == "__main__":
    main()
