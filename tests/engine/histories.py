"""A model of the file system that a run shares with a stranger, who acts between any two of its system calls.

A run is carried out in this process, its system calls counted. Before the call with a given number the stranger
acts, or the run dies: from then on no call of it changes anything, and its descriptors are closed, as the kernel
would.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4convert.engine import names
from dsv4convert.engine.conversion import execute
from dsv4convert.engine.journal import journal_path
from dsv4convert.engine.manifest import check_manifest, manifest_path
from dsv4convert.engine.outputs import outputs_of, partial_path, replaced_path, trial_path
from dsv4convert.errors import Dsv4Error
from dsv4convert.plan import CopySegments, OutputFile, OutputTensor, Plan

from .plans import failing_after

# Longer than any run, so that work is recorded once, in an order that does not depend on the clock.
NEVER_SECONDS = 1000.0

WATCHED = (
    *("open", "close", "stat", "lstat", "scandir", "listdir", "mkdir", "rmdir", "unlink", "rename", "replace", "link"),
    *("pwrite", "pread", "preadv", "ftruncate", "fsync", "fdatasync", "copy_file_range", "sendfile"),
)
REMOVALS = ("unlink", "rmdir")
LOOKS = ("stat", "lstat")
# What a dead process can still do: the kernel closes its files.
BY_THE_KERNEL = ("close",)


class Killed(BaseException):
    """The run is dead."""


@dataclass(frozen=True)
class Deed:
    """What happens before a system call: ``kind`` to the name with number ``name`` (modulo all names)."""

    kind: str
    name: int = 0


KILL = "kill"
KINDS = ("file", "folder", "take file", "take folder", "move", "remove", "restore")


@dataclass
class World:
    """A folder with a source, a plan, and things of a stranger, each known by its content."""

    base: Path
    shape: str
    strangers: dict[str, bytes] = field(default_factory=dict)
    moved: list[tuple[Path, Path]] = field(default_factory=list)
    number: int = 0

    def __post_init__(self) -> None:
        self.source, self.out = self.base / "source", self.base / "out"
        for folder in (self.source, self.out, self.base / "aside"):
            folder.mkdir(parents=True)
        self.plan = self.planned("new")
        self.good = self.expected(self.plan)
        self.old: dict[Path, bytes] = {}
        self.taken: set[Path] = set()
        self.given_up: set[bytes] = set()
        self.unlooked: dict[Path, list[Path]] = {}
        self.moment = time.time_ns()

    def planned(self, of: str) -> Plan:
        """Return a plan whose bytes depend on ``of``: two tensors in each of one or two files."""
        data = self.source / of
        data.write_bytes(b"".join(f"{of} {number:04} ".encode() for number in range(60)))
        files = []
        for number in range(1 if self.shape == "file" else 2):
            tensors = tuple(
                OutputTensor(f"t{number}{part}", "u8", (200,), 16 + 200 * part, 200, _copy(data, 100 * number, part))
                for part in range(2)
            )
            files.append(OutputFile(f"part{number}", b"head of " + f"{of}.".encode(), tensors, 416))
        is_folder = self.shape == "folder"
        destination = self.out / "folder" if is_folder else self.out
        return Plan("copy", self.source, destination, is_folder, tuple(files), (), {}, 800)

    @staticmethod
    def expected(plan: Plan) -> dict[Path, bytes]:
        """Return what the finished files hold."""
        wanted = {}
        for path, file in zip(plan.final_paths(), plan.files, strict=True):
            data = bytearray(file.nbytes)
            data[: len(file.header)] = file.header
            for tensor in file.tensors:
                position = tensor.offset
                for segment in tensor.segments:
                    operand = segment.operands[0]
                    begin = operand.offset
                    data[position : position + segment.nbytes] = operand.file.read_bytes()[
                        begin : begin + segment.nbytes
                    ]
                    position += segment.nbytes
            wanted[path] = bytes(data)
        return wanted

    def names(self) -> list[Path]:
        """Return every name that a run has to do with, the final ones first."""
        plan, manifest = self.plan, manifest_path(self.plan)
        found = list(plan.final_paths())
        if plan.is_folder:
            root = partial_path(plan.destination)
            found += [plan.destination, root, root / "part0", root / "stranger", plan.destination / "stranger"]
        else:
            found += [partial_path(path) for path in plan.final_paths()]
        found += [journal_path(plan), manifest, partial_path(manifest)]
        found += [replaced_path(plan.output_path()), trial_path(plan.output_path())]
        return found

    def act(self, deed: Deed) -> None:
        """Let the stranger do something; what cannot be done is not."""
        path = self.names()[deed.name % len(self.names())]
        try:
            self._act(deed, path)
        finally:
            # Clocks of file systems tick slowly, and this stranger is quick: every deed gets a time of its own.
            for folder in {path, path.parent}:
                self.moment += 1_000_000
                with contextlib.suppress(OSError):
                    if folder.is_dir():
                        os.utime(folder, ns=(self.moment, self.moment))

    def _act(self, deed: Deed, path: Path) -> None:
        with contextlib.suppress(OSError):
            if deed.kind in ("move", "take file", "take folder"):
                self._move(path)
            if deed.kind == "remove":
                self._remove(path)
            if deed.kind in ("file", "take file"):
                self._put(path)
            if deed.kind in ("folder", "take folder"):
                path.mkdir()
                self._put(path / "thesis")
            if deed.kind == "restore" and self.moved:
                aside, where = self.moved[deed.name % len(self.moved)]
                names.rename_new(aside, where)
                self.moved.remove((aside, where))

    def _put(self, path: Path) -> None:
        self.number += 1
        text = f"three years of work, number {self.number}".encode()
        with path.open("xb") as file:
            file.write(text)
        self.strangers[str(self.number)] = text

    def _move(self, path: Path) -> None:
        self.number += 1
        aside = self.base / "aside" / str(self.number)
        os.rename(path, aside)
        self.moved.append((aside, path))
        self.taken.add(path)

    def _remove(self, path: Path) -> None:
        """Remove what stands at a path, the stranger's own things with it."""
        files = [entry for entry in path.rglob("*") if entry.is_file()] if path.is_dir() else [path]
        gone = [file.read_bytes() for file in files]
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.strangers = {key: text for key, text in self.strangers.items() if text not in gone}
        self.taken.add(path)

    # ---- runs

    def run(self, deeds: dict[int, Deed], stop_after: int | None = None, **options: bool) -> str:
        """Carry out the plan among ``deeds``, by the number of the system call; return how it ended."""
        self.taken = set()
        self.unlooked = self._discarded(**options)
        watch = Watch(self, deeds)
        bad_disk = contextlib.nullcontext() if stop_after is None else failing_after(stop_after)
        try:
            with bad_disk, watch.installed():
                execute(self.plan, threads=1, record_seconds=NEVER_SECONDS, **options)
            ended = "done"
        except Killed:
            ended = KILL
        except Dsv4Error as error:
            ended = f"{error.exit_code} {error}"
        finally:
            self.calls_log = watch.log
        self.calls = watch.calls
        self.check(ended)
        return ended

    def _discarded(self, overwrite: bool = False, fresh: bool = False, **_: bool) -> dict[Path, list[Path]]:
        """Return the names at which a run looks first, each with the files under it that it may replace or discard."""
        outputs, found = outputs_of(self.plan), dict[Path, list[Path]]()
        for asked, looked_at, files in (
            (overwrite, outputs.final(), self.plan.final_paths()),
            (fresh, outputs.temporary(), outputs.paths),
        ):
            for file in files if asked else ():
                found.setdefault(looked_at[0] if self.plan.is_folder else file, []).append(file)
        return found

    def look(self, looked_at: Path) -> None:
        """What stands under a name when a run that was told to replace or discard it first looks there may be lost."""
        for path in self.unlooked.pop(looked_at, ()):
            if path.is_file():
                text = path.read_bytes()
                self.given_up.add(text)
                self.strangers = {key: kept for key, kept in self.strangers.items() if kept != text}

    def check(self, ended: str) -> None:
        """Check that nothing of the stranger's is lost, no final name stands for anything wrong, and done is done."""
        there = [path.read_bytes() for path in self.base.rglob("*") if path.is_file()]
        lost = [text for text in self.strangers.values() if text not in there]
        assert not lost, f"lost after {ended}: {lost}"
        finals = self.plan.final_paths()
        for path in finals:
            if path.is_file():
                data = path.read_bytes()
                mine = (self.good[path], self.old.get(path))
                known = {*self.strangers.values(), *self.given_up}
                assert data in mine or data in known, f"{path.name} after {ended}: {data[:40]!r}"
        if self.old and finals[0].is_file() and finals[0].read_bytes() == self.good[finals[0]]:
            for path in finals:
                assert not path.is_file() or path.read_bytes() != self.old[path], "a mixture of old and new"
        if ended == "done" and not any(self._is_of_the_output(path) for path in self.taken):
            for path in finals:
                assert path.read_bytes() == self.good[path], f"done without {path.name}"
            report = check_manifest(self.plan.output_path())
            strange = {"stranger", "thesis"}
            assert not [entry for entry in report.mismatches if entry.file not in strange]

    def _is_of_the_output(self, path: Path) -> bool:
        finals = self.plan.final_paths()
        return path in (*finals, manifest_path(self.plan), self.plan.destination)


def _copy(data: Path, start: int, part: int) -> CopySegments:
    return CopySegments(data, start + 200 * part, 200)


class Watch:
    """Counts a run's system calls on the world's files, and lets things happen before them."""

    def __init__(self, world: World, deeds: dict[int, Deed]) -> None:
        self.world, self.deeds = world, deeds
        self.calls, self.dead = 0, False
        self.acting = False
        self.late: list[Deed] = []
        self.lock = threading.RLock()
        self.log: list[str] = []

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Watch until the block ends."""
        real = {name: getattr(os, name) for name in WATCHED}
        real_renameat2 = names._renameat2
        for name, function in real.items():
            setattr(os, name, self._watching(name, function))
        names._renameat2 = self._watching("renameat2", real_renameat2)
        try:
            yield
        finally:
            for name, function in real.items():
                setattr(os, name, function)
            names._renameat2 = real_renameat2

    def _watching(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with self.lock:
                if self.acting or not self._concerns(arguments):
                    return function(*arguments, **options)
                if self.dead:
                    if name in BY_THE_KERNEL:
                        return function(*arguments, **options)
                    raise Killed
                deed = self.deeds.get(self.calls)
                self.calls += 1
                due, self.late = [*self.late, *([deed] if deed else [])], []
                for one in due:
                    # No system can remove a name only if it still stands for a known file: the look and the
                    # removal after it count as one call.
                    if name in REMOVALS and one.kind != KILL:
                        self.late.append(one)
                    else:
                        self._happen(one, name)
                if self.dead and name not in BY_THE_KERNEL:
                    raise Killed
                if name in LOOKS and not isinstance(arguments[0], int):
                    self._look(Path(arguments[0]))
                return function(*arguments, **options)

        return call

    def _look(self, path: Path) -> None:
        self.acting = True
        try:
            self.world.look(path)
        finally:
            self.acting = False

    def _concerns(self, arguments: tuple[Any, ...]) -> bool:
        first = arguments[0] if arguments else None
        return isinstance(first, int) or (
            isinstance(first, (str, os.PathLike)) and os.fspath(first).startswith(str(self.world.base))
        )

    def _happen(self, deed: Deed, name: str) -> None:
        if deed.kind == KILL:
            self.dead = True
            return
        self.acting = True
        try:
            self.log.append(f"before call {self.calls} ({name}): {deed}")
            self.world.act(deed)
        finally:
            self.acting = False
