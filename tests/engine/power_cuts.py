"""Replays power cuts at the block level: ext4 and XFS images made of a log of writes, mounted, checked and resumed.

    python -m tests.engine.power_cuts FOLDER --file-systems ext4 xfs --cuts 50 --save RECORD.json

A command runs on a disk that logs its writes and flushes (``logged_disk``), at times killed and resumed, while the
kernel is made to write back at random moments. A cut keeps every write before some flush and any of those after it,
in part too. Of each cut the image is mounted and checked: the source is whole; a final name stands for nothing but a
whole output, old or new, never both; what a run with exit code 0 has made is there; ``--resume`` ends with the bytes
of a run that was left alone; fsck finds nothing. Needs root, /dev/fuse, loop devices and the programs of the file
systems. ``--lying`` makes fsync do nothing, which the checks must find.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .commands import (
    COMMANDS,
    OUT,
    PARTS,
    SOURCES,
    WITHOUT_RESUME,
    Child,
    Promise,
    empty_out,
    files_of,
    final_files,
    make_sources,
    run_alone,
    save_record,
    words,
)
from .logged_disk import (
    PAGE_BYTES,
    SECTOR_BYTES,
    Cut,
    Log,
    copy_extents,
    copy_sparse,
    have_mounts_alone,
    logged_disk,
    loop_device,
    mounted,
    try_disk,
)


@dataclass(frozen=True)
class FileSystem:
    """How to make, mount and check a file system, and the bytes that it needs a disk to write as one."""

    kind: str
    mebibytes: int
    make: tuple[str, ...]
    check: tuple[str, ...]
    options: str = "noatime"
    atomic_bytes: int = SECTOR_BYTES


EXT4 = FileSystem(
    "ext4",
    48,
    ("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0"),
    ("e2fsck", "-f", "-n"),
    # The superblock takes two sectors and has one checksum: with half of it written, ext4 cannot be mounted any more.
    atomic_bytes=2 * SECTOR_BYTES,
)
FILE_SYSTEMS = {
    "ext4": EXT4,
    "ext4 data=writeback": replace(EXT4, options="noatime,data=writeback"),
    # XFS logs parts of its 4 KiB blocks only, so a block of which half is written cannot be mounted any more.
    "xfs": FileSystem("xfs", 320, ("mkfs.xfs", "-q"), ("xfs_repair", "-n"), "noatime,nouuid", PAGE_BYTES),
}

NUDGE = "nudge"
RESUMABLE = [command for command in COMMANDS if command not in WITHOUT_RESUME]

UNABLE = 75  # exit code where the system does not let us make disks

KILLS = (0, 0, 1, 2)
RUN_SECONDS = 0.2  # about as long as a slowed run, so that kills fall within it
NUDGE_SECONDS = 0.004
SYNC_FILE_RANGE_WRITE = 2

libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Case:
    """A command on a file system, its disk as it is before the command, and what is right after it."""

    command: str
    overwrite: bool
    system: FileSystem
    folder: Path
    sources: dict[str, bytes] = field(default_factory=dict)
    is_renumbered: bool = False

    @property
    def base(self) -> Path:
        return self.folder / "base.img"

    @contextlib.contextmanager
    def mounted_image(self, image: Path) -> Iterator[Path]:
        with (
            loop_device(image) as device,
            mounted(device, self.folder / "disk", self.system.kind, self.system.options) as disk,
        ):
            yield disk

    @property
    def overwriting(self) -> tuple[str, ...]:
        return ("--overwrite",) if self.overwrite else ()

    def line(self) -> list[str]:
        """Return the command's arguments; an older output is replaced."""
        return words(self.command, self.folder / "disk", "--resume", *self.overwriting)

    def prepare(self, sources: Path, older: Path) -> None:
        """Make the disk, with a source, an older output where it is to be replaced, and the file of somebody else."""
        raw = self.folder / "raw.img"
        with raw.open("wb") as file:
            file.truncate(self.system.mebibytes << 20)
        subprocess.run([*self.system.make, str(raw)], check=True, capture_output=True)
        with self.mounted_image(raw) as disk:
            for name in SOURCES:
                place = sources / name
                (shutil.copytree if place.is_dir() else shutil.copy2)(place, disk / name)
            before = final_files(empty_out(disk, older if self.overwrite else None))
            self.sources = _all_but_outputs(disk)
        copy_sparse(raw, self.base)
        with self.mounted_image(raw) as disk:
            self.promise = Promise(before, run_alone(self.command, disk, *self.overwriting))
        raw.unlink()

    # ---- recording

    def record(self, rng: random.Random, lying: bool) -> tuple[Log, int, int]:
        """Run the command on a disk that logs; return the log, the entries when it was done, and the kills before."""
        image, path = self.folder / "disk.img", self.folder / "writes.log"
        path.unlink(missing_ok=True)
        copy_extents(self.base, image)
        with (
            logged_disk(image, path) as device,
            mounted(device, self.folder / "disk", self.system.kind, self.system.options) as disk,
        ):
            kills = rng.choice(KILLS)
            for _ in range(kills):
                child = self._child(lying)
                self._nudge(child, disk, rng, time.monotonic() + rng.uniform(0, RUN_SECONDS))
                child.kill()
                child.end()
            child = self._child(lying)
            self._nudge(child, disk, rng, None)
            code, said = child.end()
            done = path.stat().st_size
            if code or self.promise.differing(disk / OUT):
                raise SystemExit(f"{self.command}: exit code {code} without a power cut: {said}")
        log = Log(path)
        return log, log.entries_within(done), kills

    def _child(self, lying: bool) -> Child:
        return Child(self.line(), slow=True, prepare=_lie if lying else None)

    @staticmethod
    def _nudge(child: Child, disk: Path, rng: random.Random, until: float | None) -> None:
        """Write back some of the disk at random moments, as the kernel does when it pleases, while the child runs."""
        with (disk / NUDGE).open("wb", buffering=0) as file:
            while child.is_alive() and (until is None or time.monotonic() < until):
                time.sleep(rng.uniform(0, NUDGE_SECONDS))
                how = rng.random()
                if how < 0.5:
                    with contextlib.suppress(OSError):  # what the child has removed meanwhile
                        files = [path for path in (disk / OUT).rglob("*") if path.is_file()]
                        with rng.choice(files).open("rb") as written:
                            libc.sync_file_range(
                                written.fileno(), ctypes.c_int64(0), ctypes.c_int64(0), SYNC_FILE_RANGE_WRITE
                            )
                elif how < 0.9:
                    file.write(b".")
                    os.fsync(file.fileno())  # ends a transaction of the journal, whatever else is in it
                else:
                    libc.syncfs(file.fileno())

    # ---- checking

    def check_cut(self, image: Path, is_done: bool, states: collections.Counter[str]) -> list[str]:
        """Mount what a cut left, check it, resume, and check again; return everything that is wrong.

        Of every other cut the disk has another device number than before, as after a restart.
        """
        wrong: list[str] = []
        self.is_renumbered = not self.is_renumbered
        try:
            with contextlib.ExitStack() as stack:
                if self.is_renumbered:
                    stack.enter_context(loop_device(self.base))
                disk = stack.enter_context(self.mounted_image(image))
                if _all_but_outputs(disk) != self.sources:
                    wrong.append("the source is not whole")
                out = disk / OUT
                wrong += self.promise.broken(final_files(out), done=is_done)
                states[self.promise.state(out)] += 1
                code, said = Child(self.line()).end()
                if code:
                    wrong.append(f"--resume: exit code {code}: {said}")
                elif differing := self.promise.differing(out):
                    wrong.append(f"--resume: not as in a run left alone: {', '.join(differing)}")
        except subprocess.CalledProcessError as error:
            return [*wrong, f"{' '.join(error.cmd)}: {error.stderr.strip()}"]
        with loop_device(image) as device:
            checked = subprocess.run([*self.system.check, device], check=False, capture_output=True, text=True)
        if checked.returncode:
            wrong.append(f"{self.system.check[0]}: {checked.stdout.strip()[-300:]}")
        return wrong


def _all_but_outputs(disk: Path) -> dict[str, bytes]:
    """Return all files of a disk but the outputs, what is used up, and the file written to make the disk write."""
    return {
        name: data for name, data in files_of(disk).items() if name != NUDGE and Path(name).parts[0] not in (OUT, PARTS)
    }


def _lie() -> None:
    """Make fsync and fdatasync do nothing, for the control that the checks must find."""
    for name in ("fsync", "fdatasync"):
        setattr(os, name, lambda descriptor: None)


def replay(case: Case, log: Log, done: int, cuts: list[Cut], states: collections.Counter[str]) -> list[str]:
    """Check all cuts of a log; return what is wrong."""
    wrong: list[str] = []
    durable, image = case.folder / "durable.img", case.folder / "cut.img"
    copy_extents(case.base, durable)
    applied = 0
    for cut in sorted(cuts, key=lambda one: one.flushed):
        descriptor = os.open(durable, os.O_WRONLY)
        log.apply(descriptor, range(applied, cut.flushed))
        os.close(descriptor)
        applied = cut.flushed
        copy_extents(durable, image)
        descriptor = os.open(image, os.O_WRONLY)
        log.apply_cut(descriptor, cut)
        os.close(descriptor)
        name = f"{case.command}, cut after entry {cut.entries}, writes {cut.flushed} + {len(cut.kept)}"
        wrong += [f"{name}: {what}" for what in case.check_cut(image, cut.entries >= done, states)]
    return wrong


def choose(log: Log, rng: random.Random, most: int, atomic_bytes: int) -> list[Cut]:
    """Return so many different cuts: up to half of them at flushes, the last ones for certain; the others random.

    Half of the random ones lie in the last quarter, where names change.
    """
    boundaries = log.boundaries()
    last = boundaries[-(most // 4) :]
    others = boundaries[: -(most // 4)]
    cuts = {*last, *rng.sample(others, min(len(others), most // 4))}
    for _ in range(20 * most):
        if len(cuts) == most:
            break
        cuts.add(log.random_cut(rng, atomic_bytes, rng.choice((0, len(log.writes) * 3 // 4))))
    return sorted(cuts, key=lambda cut: cut.entries)


def run(
    folder: Path, system: str, commands: list[str], cuts: int, seed: int = 0, *, lying: bool = False
) -> dict[str, Any]:
    """Record and replay commands on one file system, each with and without an older output; return the record."""
    sources, older = folder / "sources", folder / "older"
    for base, number in ((sources, 0), (older, 1)):
        if not base.exists():
            base.mkdir(parents=True)
            make_sources(base, number)
    record: dict[str, Any] = {"file_system": system, "cuts": 0, "wrong": [], "cases": []}
    for command in commands:
        empty_out(older)
        run_alone(command, older)
        for replaces in (False, True):
            rng = random.Random(f"{system} {command} {replaces} {seed}")
            place = folder / "case"
            place.mkdir()
            began = time.monotonic()
            case = Case(command, replaces, FILE_SYSTEMS[system], place)
            case.prepare(sources, older / OUT)
            log, done, kills = case.record(rng, lying)
            states: collections.Counter[str] = collections.Counter()
            chosen = choose(log, rng, cuts, case.system.atomic_bytes)
            wrong = replay(case, log, done, chosen, states)
            shutil.rmtree(place)
            record["cuts"] += len(chosen)
            record["wrong"] += wrong
            record["cases"].append(
                {
                    "command": command + (" --overwrite" if replaces else ""),
                    "writes": len(log.writes),
                    "flushes": len(log.flushes),
                    "kills": kills,
                    "cuts": len(chosen),
                    "at_flushes": sum(not cut.kept for cut in chosen),
                    "after_done": sum(cut.entries >= done for cut in chosen),
                    "wrong": len(wrong),
                    "states": dict(sorted(states.items())),
                    "seconds": round(time.monotonic() - began, 1),
                }
            )
            sys.stderr.write(f"{system}: {json.dumps(record['cases'][-1])}\n")
    return record


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder in memory for images; it must not exist")
    parser.add_argument("--file-systems", nargs="+", choices=FILE_SYSTEMS, default=list(FILE_SYSTEMS))
    parser.add_argument("--commands", nargs="+", choices=RESUMABLE, default=RESUMABLE)
    parser.add_argument("--cuts", type=int, default=100, help="cuts of each command with and without --overwrite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lying", action="store_true", help="make fsync do nothing: a control, which must fail")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    began = time.monotonic()
    try:
        try:
            have_mounts_alone()
            try_disk(arguments.folder)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.stderr.write(f"no logged disks on this machine: {error}\n")
            sys.exit(UNABLE)
        results = [
            run(arguments.folder, system, arguments.commands, arguments.cuts, arguments.seed, lying=arguments.lying)
            for system in arguments.file_systems
        ]
    finally:
        shutil.rmtree(arguments.folder)
    found = {
        "cuts": sum(result["cuts"] for result in results),
        "wrong": sum(len(result["wrong"]) for result in results),
        "file_systems": results,
    }
    save_record(found, arguments.seed, began, arguments.save)


if __name__ == "__main__":
    main()
