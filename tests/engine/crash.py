"""Runs a conversion in forked children that die in the middle, and goes on until it is whole; a program of its own.

    python -m tests.engine.crash TARGET SOURCE FOLDER --mode kill|step|power --runs N --seed S

``kill`` ends a child with SIGKILL at a random moment. ``step`` ends it before a chosen system call that
changes a file. ``power`` does too, and then takes back what was not durable yet: written bytes, lengths,
names. It prints one JSON object: how many children died, and everything that was not as promised.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4convert.engine import names
from dsv4convert.engine.conversion import execute
from dsv4convert.engine.journal import Journal, journal_path
from dsv4convert.engine.manifest import manifest_path
from dsv4convert.engine.worker import Worker
from dsv4convert.plan import Plan
from dsv4convert.targets.dequantize import plan_dequantize
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions
from dsv4convert.targets.mend import Mends, plan_mend
from dsv4convert.targets.shard_tensors import ShardOptions
from dsv4convert.targets.shards import plan_shards

from .kernel_copies import KERNEL_COPIES, make_in_python
from .plans import LOW_BIT

PLANS: dict[str, Callable[[Path, Path], Plan]] = {
    # Several files of one output, files of a folder, and folders of several codecs.
    "hf-to-gguf": lambda source, out: plan_gguf(source, out / "model.gguf", GgufOptions(split_max_bytes=1_500_000)),
    "hf-to-gguf, low-bit types": lambda source, out: plan_gguf(source, out / "model.gguf", LOW_BIT),
    "shard": lambda source, out: plan_shards(source, out / "shards", ShardOptions(2)).plan,
    "dequantize": lambda source, out: plan_dequantize(source, out / "bf16", max_file_bytes=4_000_000),
    # A file that is shared with the source, and one that is written.
    "mend": lambda source, out: plan_mend(source, out / "mended", Mends(drop_draft=True)),
}

# Recorded as often as it goes, so that a run of some milliseconds has many states to die in.
RECORD_SECONDS = 0.002
THREADS = 2
CHILD_SECONDS = 60.0
SEGMENT_SECONDS = 0.0005

WATCHED = ("open", "pwrite", *KERNEL_COPIES, "ftruncate", "fsync", "fdatasync", "replace", "unlink", "mkdir", "link")
OLD = b'{"manifest": "of an older run"}'


class Killer:
    """Counts the system calls that change files, and ends the process before the one with a given number."""

    def __init__(self, last: int, power: random.Random | None) -> None:
        self.left = last
        self.power = power
        self.lock = threading.RLock()
        self.undo: list[tuple[tuple[int, int], Callable[[], None]]] = []
        self.real = {name: getattr(os, name) for name in WATCHED}

    def install(self) -> None:
        for name in WATCHED:
            setattr(os, name, lambda *args, _name=name, **options: self.call(_name, *args, **options))
        self.real["renameat2"] = names._renameat2
        names._renameat2 = lambda *args: self.call("renameat2", *args)
        if self.power is not None:
            make_in_python(pytest.MonkeyPatch())  # for the rest of this process

            def refuse(*args: Any, **options: Any) -> int:
                raise OSError(38, "not for this test, which must see the bytes")

            for name in KERNEL_COPIES:
                setattr(os, name, refuse)

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        if name == "open" and not args[1] & os.O_CREAT:
            return self.real[name](*args, **options)
        with self.lock:
            self.left -= 1
            if self.left < 0:
                if self.power is not None:
                    self.fail_power()
                os.kill(os.getpid(), signal.SIGKILL)
            if self.power is not None and "dir_fd" not in options:
                getattr(self, "note_" + name)(*args)
            return self.real[name](*args, **options)

    def fail_power(self) -> None:
        """Take back what is not durable: all of it, or at times only the latest part."""
        assert self.power is not None
        keep = self.power.choice((0, 0, self.power.randrange(len(self.undo) + 1)))
        for _, back in reversed(self.undo[keep:]):
            back()

    def changed(self, key: tuple[int, int], back: Callable[[], None]) -> None:
        self.undo.append((key, back))

    def note_pwrite(self, descriptor: int, data: Any, offset: int) -> None:
        own = self.real["open"](f"/proc/self/fd/{descriptor}", os.O_RDWR)
        size = os.fstat(own).st_size
        old = os.pread(own, memoryview(data).nbytes, offset)

        def back() -> None:
            self.real["pwrite"](own, old, offset)
            self.real["ftruncate"](own, size)

        self.changed(_key(os.fstat(own)), back)

    def note_ftruncate(self, descriptor: int, length: int) -> None:
        own = self.real["open"](f"/proc/self/fd/{descriptor}", os.O_RDWR)
        old = os.pread(own, os.fstat(own).st_size, 0)

        def back() -> None:
            self.real["ftruncate"](own, 0)
            self.real["pwrite"](own, old, 0)

        self.changed(_key(os.fstat(own)), back)

    def durable(self, descriptor: int) -> None:
        key = _key(os.fstat(descriptor))
        self.undo = [entry for entry in self.undo if entry[0] != key]

    note_fsync = note_fdatasync = durable

    def note_open(self, path: Any, flags: int, mode: int = 0) -> None:
        if not os.path.lexists(path):
            self.changed(_folder_of(path), lambda: self.real["unlink"](path))

    def note_mkdir(self, path: Any, mode: int = 0) -> None:
        if not os.path.lexists(path):
            self.changed(_folder_of(path), lambda: shutil.rmtree(path))

    def note_link(self, source: Any, path: Any) -> None:
        if not os.path.lexists(path):
            self.changed(_folder_of(path), lambda: self.real["unlink"](path))

    def note_unlink(self, path: Any) -> None:
        if os.path.lexists(path):
            kept = f"{path}.kept{len(self.undo)}"
            self.real["link"](path, kept)
            self.changed(_folder_of(path), lambda: os.rename(kept, path))

    def note_renameat2(self, old: Any, new: Any, flags: int) -> None:
        if flags == names.RENAME_EXCHANGE:
            if os.path.lexists(old) and os.path.lexists(new):
                self.changed(_folder_of(new), lambda: self.real["renameat2"](old, new, flags))
        elif not os.path.lexists(new):
            self.changed(_folder_of(new), lambda: os.rename(new, old))

    def note_replace(self, old: Any, new: Any) -> None:
        kept = f"{new}.kept{len(self.undo)}"
        had = os.path.isfile(new)
        if had:
            self.real["link"](new, kept)

        def back() -> None:
            os.rename(new, old)
            if had:
                os.rename(kept, new)

        self.changed(_folder_of(new), back)


def _key(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _folder_of(path: Any) -> tuple[int, int]:
    return _key(os.stat(os.path.dirname(os.fspath(path)) or "."))


def contents(plan: Plan) -> dict[str, bytes]:
    """Return the finished files of a plan and its manifest, by name."""
    paths = [path for path in (*plan.final_paths(), manifest_path(plan)) if path.is_file()]
    return {str(path.relative_to(plan.destination.parent)): path.read_bytes() for path in paths}


def recorded_bytes(plan: Plan) -> int:
    """Return the bytes of the segments that the journal says are finished."""
    if not journal_path(plan).is_file():
        return 0
    with Journal(journal_path(plan)) as journal:
        return sum(plan.files[f].tensors[t].segments[s].nbytes for f, t, s in journal.finished())


def slow_down() -> None:
    """Let each segment take a moment, so that a run has moments to die in with something recorded."""
    run = Worker.run

    def slow(self: Worker, *arguments: Any) -> Any:
        time.sleep(SEGMENT_SECONDS)
        return run(self, *arguments)

    Worker.run = slow  # type: ignore[method-assign]


def child(plan: Plan, killer: Killer | None, overwrite: bool) -> tuple[int, int]:
    """Fork a child that carries out the plan; return its process and the end of its pipe."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    try:
        os.close(reading)
        if killer is not None:
            killer.install()
        summary = execute(plan, threads=THREADS, resume=True, overwrite=overwrite, record_seconds=RECORD_SECONDS)
        text = f"done {summary.resumed_bytes}"
    except BaseException as error:  # noqa: BLE001 - reported to the parent
        text = f"{type(error).__name__}: {error}"
    os.write(writing, text.encode())
    os._exit(0)


def wait(process: int, reading: int, kill_after: float | None) -> str:
    """Return what a child said; "" if it died. A child that hangs is killed and says so."""
    began = time.monotonic()
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(process, signal.SIGKILL)
    while os.waitpid(process, os.WNOHANG) == (0, 0):
        if time.monotonic() - began > CHILD_SECONDS:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return "hung"
        time.sleep(0.0005)
    with os.fdopen(reading, "rb") as pipe:
        return pipe.read().decode()


def wrong_finals(plan: Plan, good: dict[str, bytes], old: dict[str, bytes]) -> list[str]:
    """Return the names of finished files that are neither those of this output nor older ones."""
    return [name for name, data in contents(plan).items() if data not in (good.get(name), old.get(name))]


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=PLANS)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mode", choices=("kill", "step", "power"), required=True)
    parser.add_argument("--runs", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(f"{arguments.target} {arguments.mode} {arguments.seed}")

    out = arguments.folder / "out"
    out.mkdir(parents=True)
    plan = PLANS[arguments.target](arguments.source, out)
    slow_down()
    began = time.monotonic()
    execute(plan, threads=THREADS, record_seconds=RECORD_SECONDS)
    whole_run = time.monotonic() - began
    good = contents(plan)
    leftovers = sorted(path.name for path in out.iterdir())

    died = conversions = resumed = 0
    wrong: list[str] = []
    while died < arguments.runs and not wrong:
        conversions += 1
        # Every other conversion replaces an older output.
        overwrite = conversions % 2 == 0
        if not overwrite:
            shutil.rmtree(out)
            out.mkdir()
        old = contents(plan) if overwrite else {}
        if overwrite:
            for path in (*plan.final_paths(), manifest_path(plan)):
                path.unlink()  # it may be the source's file under another name
                path.write_bytes(OLD)
            old = contents(plan)
        while True:
            killer, delay = None, None
            if arguments.mode == "kill":
                delay = rng.uniform(0, 1.5 * whole_run)
            else:
                killer = Killer(rng.randrange(260), rng if arguments.mode == "power" else None)
            said = wait(*child(plan, killer, overwrite), delay)
            wrong += [f"{name} is neither old nor whole" for name in wrong_finals(plan, good, old)]
            died += not said
            if said.startswith("done") or wrong:
                break
            if said:
                wrong.append(said)
                break
            for kept in out.rglob("*.kept*"):
                kept.unlink()
            before = recorded_bytes(plan)
            if rng.random() < 0.5:  # the next one lives
                said = wait(*child(plan, None, overwrite), None)
                if said != f"done {before}" and before:
                    wrong.append(f"after {before} recorded bytes: {said}")
                resumed += before > 0
                break
        for kept in out.rglob("*.kept*"):
            kept.unlink()
        if contents(plan) != good:
            wrong.append("the result differs from that of a run that was left alone")
        if sorted(path.name for path in out.iterdir()) != leftovers:
            wrong.append(f"left over: {sorted(path.name for path in out.iterdir())}")
    json.dump({"died": died, "conversions": conversions, "resumed": resumed, "wrong": wrong}, sys.stdout)


if __name__ == "__main__":
    main()
