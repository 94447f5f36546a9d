"""Runs commands in alternation and reports wall time, memory and medians: the frame of the command benchmarks."""

from __future__ import annotations

import argparse
import compileall
import contextlib
import ctypes
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import dsv4convert
from dsv4convert.containers.safetensors import Stored, read_header
from dsv4convert.synth.values import tensor_stream
from dsv4convert.synth.write import SynthTensor, plan_synth, write_plan, write_synth


def common_arguments(doc: str | None, folder: str, *, rounds: int = 7, warmup: int = 2) -> argparse.ArgumentParser:
    """Return a parser with the options that the benchmarks of commands share, and their defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm", folder))
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--warmup", type=int, default=warmup)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", type=Path)
    return parser


def make_flash_slice(source: Path, experts: int = 48, layers: int = 4) -> None:
    """Write layers of Flash, of each four one of every kind, unless they are there: 4.5 GB with 48 routed experts each.

    All processors write, as one would take minutes for a slice of tens of gigabytes.
    """
    if source.is_dir():
        return
    source.parent.mkdir(parents=True, exist_ok=True)
    plan = plan_synth("flash", ratios=((0, 4, 128, 4) * -(-layers // 4))[:layers], experts=experts, vocab=32768)
    partial = source.with_name(f"{source.name}.partial")
    write_plan(plan, partial, headers_only=True, overwrite=True)
    tensors = {tensor.name: tensor for group in plan.files for tensor in group}
    places = [place for path in sorted(partial.glob("*.safetensors")) for place in read_header(path).items()]
    with ProcessPoolExecutor() as pool:
        list(pool.map(_fill, *zip(*((tensors[name], place) for name, place in places), strict=True), chunksize=8))
    partial.rename(source)


def _fill(tensor: SynthTensor, place: Stored) -> None:
    """Write the bytes of one tensor where they belong."""
    with place.file.open("r+b", buffering=0) as file:
        file.seek(place.offset)
        for piece in tensor_stream(tensor.recipe, tensor.name, tensor.shape, 0):
            while piece:
                piece = piece[file.write(piece) :]


def make_many_tensors(source: Path) -> None:
    """Write 26,725 tensors of 45 MB, unless they are there: sixteen layers with 256 tiny experts each, and a draft."""
    if not source.is_dir():
        source.parent.mkdir(parents=True, exist_ok=True)
        tiny = {"hidden_size": 128, "moe_intermediate_size": 32, "o_groups": 8}
        write_synth(source, "tiny", ratios=(0, 4, 128, 4) * 4, experts=256, files=8, overrides=tiny)


def as_many_bytes(source: Path, nbytes: int, folder: Path) -> Path:
    """Return a folder of links to the source's files, repeated, and a last file, ``nbytes`` together."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    files = sorted(source.glob("*.safetensors"))
    number, left = 0, nbytes
    while left >= (file := files[number % len(files)]).stat().st_size:
        (folder / f"{number:04d}").symlink_to(file.resolve())
        left -= file.stat().st_size
        number += 1
    with file.open("rb") as whole, (folder / "rest").open("wb") as part:
        while left:
            left -= part.write(whole.read(min(left, 2**24)))
    return folder


class Used(NamedTuple):
    """What one run of a command took."""

    seconds: float
    peak_bytes: int
    processor_seconds: float


@dataclass
class Contender:
    """A command to time: it writes to ``output``, which is removed before every round (and made, if it wants that)."""

    name: str
    command: Sequence[str]
    output: Path
    environment: dict[str, str] = field(default_factory=dict)
    rounds: int | None = None
    makes_folder_first: bool = False
    cold: bool = False  # nothing of the source in the page cache; root only
    seconds: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)

    def note(self, used: Used) -> None:
        """Keep the figures of a round."""
        self.seconds.append(used.seconds)
        self.peak_bytes.append(used.peak_bytes)
        self.processor_seconds.append(used.processor_seconds)


def run_once(contender: Contender) -> Used:
    """Run a command; return wall seconds, peak resident bytes of its largest process, and processor seconds of all.

    A process counts the peak of the one that started it, so nothing comes out smaller than this one.
    """
    remove(contender.output)
    if contender.makes_folder_first:
        contender.output.mkdir(parents=True)
    if contender.cold:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("1")
    started = time.perf_counter()
    process = subprocess.Popen(
        list(contender.command),
        env={**os.environ, **contender.environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        message = process.stderr.read().decode() if process.stderr is not None else ""
        raise SystemExit(f"{contender.name} failed:\n{message[-4000:]}")
    return Used(seconds, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime)


def remove(path: Path) -> None:
    """Remove a file, a folder, or nothing."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def memory_backed(folder: Path) -> bool:
    """Return whether a folder lies in memory."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    around = [(len(place), kind) for place, kind in mounts if folder.resolve().is_relative_to(place)]
    return max(around)[1] == "tmpfs"


@contextlib.contextmanager
def warm_memory(folder: Path, nbytes: int) -> Iterator[None]:
    """Keep ``nbytes`` of memory and more at hand for files in a memory-backed folder.

    A virtual machine gives memory that lies idle back to its host, in blocks of megabytes, and the first
    touch after that takes ten times as long as a copy: whoever comes next would pay for it by chance.
    Here a file takes the memory once and gives back all but a page in every 256 KiB of it, so that no free
    block is large enough to leave.
    """
    path, page, tooth = folder / "comb", 2**12, 2**18
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    punch_hole_keep_size = 3
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(0, nbytes * 5 // 4 + 2**29, tooth):
                file.write(bytes(tooth))
            for offset in range(0, file.tell(), tooth):
                if libc.fallocate(file.fileno(), punch_hole_keep_size, offset + page, tooth - page):
                    raise OSError(ctypes.get_errno(), "no hole can be punched", path)
        yield
    finally:
        path.unlink(missing_ok=True)


def compile_package() -> None:
    """Make the package's bytecode, which an installed package has and a fresh checkout lacks."""
    compileall.compile_dir(str(Path(dsv4convert.__file__).parent), quiet=2)


def alternate(
    contenders: Sequence[Contender],
    warmup: int,
    rounds: int,
    output_bytes: int = 0,
    say: Callable[[str], None] = print,
) -> None:
    """Run all contenders in turn, ``warmup`` rounds uncounted; those with rounds of their own are not warmed up.

    ``output_bytes`` is what each writes, for ``warm_memory`` where the outputs lie in memory.
    """
    compile_package()
    folder = contenders[0].output.parent
    with warm_memory(folder, output_bytes) if memory_backed(folder) else contextlib.nullcontext():
        for number in range(-warmup, rounds):
            for contender in contenders:
                if contender.rounds is None or 0 <= number < contender.rounds:
                    used = run_once(contender)
                    remove(contender.output)
                    label = "warm-up" if number < 0 else f"round {number + 1}"
                    say(f"{label}  {contender.name:<28} {used.seconds:7.2f} s  {used.peak_bytes / 2**20:7.0f} MiB")
                    if number >= 0:
                        contender.note(used)


def circumstances() -> dict[str, Any]:
    """Return when, of what and on what a benchmark is run, as JSON values."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "version": dsv4convert.__version__,
        "commit": commit(),
        "hardware": hardware(),
        "python": platform.python_version(),
    }


def record(contenders: Sequence[Contender], baseline: str, moved_bytes: int, **facts: Any) -> dict[str, Any]:
    """Return the result as JSON values, medians relative to the contender called ``baseline``."""
    base = statistics.median(next(c for c in contenders if c.name == baseline).seconds)
    return {
        **circumstances(),
        "baseline": baseline,
        **facts,
        "results": [
            {
                "name": c.name,
                "command": _without_folders(c),
                "rounds": len(c.seconds),
                "median_seconds": round(statistics.median(c.seconds), 3),
                "seconds": [round(s, 3) for s in c.seconds],
                "relative": round(statistics.median(c.seconds) / base, 3),
                "gigabytes_per_second": round(moved_bytes / statistics.median(c.seconds) / 1e9, 2),
                "processor_seconds": round(statistics.median(c.processor_seconds), 2),
                "peak_mebibytes": round(max(c.peak_bytes) / 2**20),
            }
            for c in contenders
        ],
    }


def _without_folders(contender: Contender) -> str:
    """Return a command as one line, without the folders of its files, which are those of one machine."""
    here = f"{contender.output.parent}/"
    return " ".join(Path(part).name if part.startswith("/") else part.replace(here, "") for part in contender.command)


def print_table(result: dict[str, Any]) -> None:
    """Print the medians of a result."""
    print(f"\n{result['hardware']}; {result['date']}; commit {result['commit']}")
    for row in result["results"]:
        print(
            f"{row['name']:<28} median {row['median_seconds']:7.2f} s  {row['relative']:6.2f} of {result['baseline']}  "
            f"{row['gigabytes_per_second']:6.2f} GB/s  peak {row['peak_mebibytes']} MiB  ({row['rounds']} rounds)"
        )


def save(result: dict[str, Any], path: Path | None) -> None:
    """Write a result next to the others, where a path is asked for."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def commit(checkout: Path | None = None) -> str:
    """Return the commit of a checkout, by default of the one that is measured."""
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=checkout
    )
    return head.stdout.strip() or "unknown"


def hardware() -> str:
    """Return processor, processor count and memory."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{model}, {len(os.sched_getaffinity(0))} processors, {pages / 2**30:.0f} GiB"
