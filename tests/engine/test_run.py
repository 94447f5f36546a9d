"""The engine: the same bytes for any number of threads and any tile, in bounded memory, told as it goes."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import xxhash

from dsv4convert.engine import kernel_copy, names
from dsv4convert.engine import worker as tiles
from dsv4convert.engine.conversion import execute
from dsv4convert.engine.kernel_copy import KernelCopier
from dsv4convert.engine.ledger import Ledger
from dsv4convert.engine.operations import rows_per_tile
from dsv4convert.engine.outputs import OPEN_FILES_PER_WORKER, DescriptorCache, os_errors, outputs_of, write_all
from dsv4convert.engine.run import RunReport, run_plan
from dsv4convert.engine.worker import Worker
from dsv4convert.errors import Dsv4Error, InputOutputError, SpaceError
from dsv4convert.formats.backend import numpy_codecs
from dsv4convert.formats.base import Tally
from dsv4convert.plan import COPY, JOIN, CopySegments, Operand, OutputFile, OutputTensor, Plan, Segment, sizes_of
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions

from .kernel_copies import make_in_python, refuse_kernel_copies
from .plans import PLANS, contents


def copying_plan(source: Path, folder: Path) -> Plan:
    """Plan a file that is a header, a gap and the bytes of ``source``."""
    size = source.stat().st_size
    tensor = OutputTensor("all", "u8", (size,), 64, size, CopySegments(source, 0, size))
    file = OutputFile("out", b"head", (tensor,), 64 + size + 32)
    return Plan("copy", source.parent, folder, False, (file,), (), {}, size)


def carry_out(plan: Plan, **options: Any) -> RunReport:
    """Make the files of a plan."""
    outputs = outputs_of(plan)
    with contextlib.closing(outputs):
        outputs.create()
        return run_plan(plan, outputs, **options)


@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("tile_bytes", [1, 4096, 2**19, 2**26])
def test_threads_and_tiles_do_not_change_the_bytes(tiny: Path, tmp_path: Path, threads: int, tile_bytes: int) -> None:
    options = GgufOptions(experts="q8_0")
    whole = plan_gguf(tiny, tmp_path / "whole.gguf", options)
    execute(whole, threads=1)
    plan = plan_gguf(tiny, tmp_path / "other.gguf", options)
    report = carry_out(plan, threads=threads, codecs=numpy_codecs(), tile_bytes=tile_bytes)
    assert (tmp_path / "other.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert len(report.tensors) == len(plan.files[0].tensors)


SIZES = [0, 1, 4096, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20 + 5]


def assert_copied(source: Path, folder: Path, **options: Any) -> None:
    """Copy the whole source into a file and compare bytes and checksum."""
    report = carry_out(copying_plan(source, folder), **options)
    assert (folder / "out").read_bytes() == b"head" + bytes(60) + source.read_bytes() + bytes(32)
    if source.stat().st_size:
        assert report.tensors[0].digest == xxhash.xxh3_128_hexdigest(source.read_bytes())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("refusal", [None, 0, errno.EXDEV, errno.ENOSYS, errno.EIO])
def test_copies_are_exact_with_and_without_help(
    size: int, refusal: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the library, by the kernel (0), without either.

    An error that is no refusal counts as one: reading and writing tell whose it is, or do without.
    """
    (tmp_path / "source").write_bytes(os.urandom(size))
    if refusal == 0:
        make_in_python(monkeypatch)
    elif refusal is not None:
        refuse_kernel_copies(monkeypatch, refusal)
    assert_copied(tmp_path / "source", tmp_path, threads=2)


@pytest.mark.parametrize("size", SIZES)
def test_copies_go_through_the_kernel_and_no_buffer(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(os.urandom(size))
    make_in_python(monkeypatch)

    def refuse(*_: Any) -> int:
        raise AssertionError("read or written through a buffer")

    monkeypatch.setattr(Worker, "_read_into", refuse)
    monkeypatch.setattr(tiles, "write_all", refuse)
    assert_copied(tmp_path / "source", tmp_path, threads=2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("begin", [0, 1, 4095, 5000])
def test_a_copy_shows_what_it_moves_from_and_to_any_place(size: int, begin: int, tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    source.write_bytes(os.urandom(begin + size))
    shown = memoryview(bytearray(size))
    with source.open("rb") as read, output.open("w+b") as written, KernelCopier() as kernel:
        moved = 0
        while moved < size and (
            count := kernel.copy_and_show(read.fileno(), begin + moved, written.fileno(), 77 + moved, shown[moved:])
        ):
            moved += count
        assert kernel.copy_and_show(read.fileno(), begin + size, written.fileno(), 77, memoryview(bytearray(9))) == 0
    assert moved == size
    assert bytes(shown) == source.read_bytes()[begin:]
    assert output.read_bytes()[77:] == bytes(shown)


@pytest.mark.parametrize("pages", [(1, 1), (16, 1), (1, 16), (256, 16)])
def test_pipes_may_be_small_and_of_different_sizes(
    pages: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = itertools.cycle(pages)

    def pipe() -> tuple[int, int]:
        ends = os.pipe2(os.O_CLOEXEC)
        fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, next(sizes) * 4096)
        return ends

    make_in_python(monkeypatch)
    monkeypatch.setattr(kernel_copy, "_pipe", pipe)
    (tmp_path / "source").write_bytes(os.urandom(2**20 + 4321))
    assert_copied(tmp_path / "source", tmp_path, threads=1)


@pytest.mark.parametrize("failing", range(1, 9))
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_copy_that_fails_halfway_leaves_nothing_in_the_pipes_for_the_next(
    failing: int, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that moves bytes can be the one; what follows is right, whether by the kernel or without it."""
    make_in_python(monkeypatch)
    (tmp_path / "source").write_bytes(os.urandom(3 * 2**20 + 5))
    calls = 0

    def failing_once(real: Any) -> Any:
        def call(*args: Any, **options: Any) -> int:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(number, os.strerror(number))
            return int(real(*args, **options))

        return call

    for owner, name in ((os, "splice"), (os, "readv"), (kernel_copy, "_tee")):
        monkeypatch.setattr(owner, name, failing_once(getattr(owner, name)))
    assert_copied(tmp_path / "source", tmp_path, threads=1)
    assert calls > failing


@pytest.mark.parametrize("missing", ["tee", "splice", "copy_file_range"])
def test_a_system_without_a_call_does_without(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_in_python(monkeypatch)
    (tmp_path / "source").write_bytes(os.urandom(2**20 + 5))
    if missing == "tee":
        kernel_copy._libc_tee.cache_clear()
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    else:
        monkeypatch.delattr(os, missing)
    assert_copied(tmp_path / "source", tmp_path, threads=1)
    assert_repeated_copies(tmp_path, threads=1)


def assert_repeated_copies(folder: Path, threads: int) -> None:
    """Copy two ranges into four files each and compare bytes and checksums."""
    source = folder / "repeated"
    source.write_bytes(content := os.urandom(3 * 2**20 + 1000))
    ranges = [(0, 2**20 + 7), (2**20 + 7, 2 * 2**20 + 993)]
    files = []
    for number in range(4):
        tensors = [
            OutputTensor(f"{begin}", "u8", (size,), begin, size, CopySegments(source, begin, size, is_repeated=True))
            for begin, size in ranges
        ]
        files.append(OutputFile(f"copy {number}", b"", tuple(tensors), len(content)))
    plan = Plan("copy", folder, folder, False, tuple(files), (), {}, len(content))
    report = carry_out(plan, threads=threads)
    assert [path.read_bytes() for path in plan.final_paths()] == [content] * 4
    digests = [xxhash.xxh3_128_hexdigest(content[begin : begin + size]) for begin, size in ranges]
    assert [tensor.digest for tensor in report.tensors] == digests * 4


@pytest.mark.parametrize("threads", [1, 3])
def test_repeated_copies_are_exact_by_the_library(threads: int, tmp_path: Path) -> None:
    assert_repeated_copies(tmp_path, threads)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_repeated_copy_is_looked_at_once(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_in_python(monkeypatch)
    shown = 0
    real = KernelCopier.copy_and_show

    def count(self: KernelCopier, *args: Any) -> int:
        nonlocal shown
        moved = real(self, *args)
        shown += moved
        return moved

    monkeypatch.setattr(KernelCopier, "copy_and_show", count)
    assert_repeated_copies(tmp_path, threads)
    # Workers that come to a copy at the same time each look at it.
    assert 3 * 2**20 + 1000 <= shown <= threads * (3 * 2**20 + 1000)


@pytest.mark.parametrize("refusal", [errno.EXDEV, errno.EIO])
def test_repeated_copies_are_exact_without_the_kernels_help(
    refusal: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_kernel_copies(monkeypatch, refusal)
    assert_repeated_copies(tmp_path, threads=2)


@pytest.mark.parametrize(("call", "message"), [("preadv", r"source: cannot be read"), ("pwrite", r"cannot be written")])
def test_an_error_of_a_copy_is_that_of_the_file_that_has_it(
    call: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failing disk fails the kernel's copy and ours alike, and ours says which of the two files it was."""
    (tmp_path / "source").write_bytes(bytes(100))
    plan = copying_plan(tmp_path / "source", tmp_path)
    outputs = outputs_of(plan)
    with contextlib.closing(outputs):
        outputs.create()

        def fail(*_: Any) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        refuse_kernel_copies(monkeypatch, errno.EIO)
        monkeypatch.setattr(os, call, fail)
        with pytest.raises(InputOutputError, match=message + r" \(Input/output error\)"):
            run_plan(plan, outputs, threads=1)


def test_a_source_that_was_cut_short_is_an_error_of_the_source(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(2**21))
    plan = copying_plan(source, tmp_path)
    os.truncate(source, 2**20 + 5)
    with pytest.raises(InputOutputError, match=r"source: the file shrank while being read"):
        carry_out(plan, threads=1)


@pytest.mark.parametrize(
    ("row_bytes", "operands", "expected"),
    [
        pytest.param(100, [(100, 1)], 5, id="rows that fit"),
        pytest.param(5000, [(5000, 1)], 1, id="a row larger than the tile"),
        pytest.param(10, [(10, 1), (1, 16)], 48, id="a multiple of the scale's block"),
        pytest.param(600, [(600, 1), (8, 128)], 128, id="at least one block"),
    ],
)
def test_a_tile_is_a_whole_number_of_scale_blocks(
    row_bytes: int, operands: list[tuple[int, int]], expected: int
) -> None:
    rows = [Operand(Path("a"), 0, size, per, "u1") for size, per in operands]
    found = rows_per_tile(Segment(JOIN, tuple(rows), 1000, row_bytes), 1000)
    assert found == expected
    assert found % math.lcm(*(operand.rows_per for operand in rows)) == 0


def test_progress_is_told_and_ends_at_the_whole(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Worker.run

    def slow(self: Worker, *arguments: Any) -> Any:
        time.sleep(0.002)
        return run(self, *arguments)

    monkeypatch.setattr(Worker, "run", slow)
    told: list[int] = []
    plan = PLANS["gguf"](tiny, tmp_path)
    execute(plan, threads=1, watch=lambda step: told.append(step.done))
    assert told == sorted(told)
    assert len(told) > 2
    assert told[-1] == sum(tensor.nbytes for tensor in plan.files[0].tensors)


def test_an_error_before_the_end_keeps_the_output_from_its_name(tiny: Path, tmp_path: Path) -> None:
    def refuse(report: Any) -> None:
        raise Dsv4Error("no")

    with pytest.raises(Dsv4Error, match="no"):
        execute(PLANS["gguf"](tiny, tmp_path), threads=1, before_finish=refuse)
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_adds_up_what_segments_counted() -> None:
    segments = (Segment(COPY, (), 4, 1), Segment(COPY, (), 2, 1))
    tensor = OutputTensor("t", "u8", (6,), 0, 6, segments)
    plan = Plan("x", Path(), Path(), False, (OutputFile("f", b"", (tensor, tensor), 12),), (), {}, 0)
    ledger = Ledger(plan)
    one, two = b"1" * 16, b"2" * 16
    ledger.add(0, 1, 1, two, Tally(nan=2))
    assert (ledger.holds(0, 1, 1), ledger.holds(0, 1, 0), ledger.is_complete) == (True, False, False)
    ledger.add(0, 1, 0, one, Tally(nan=1, changed=3))
    assert ledger[1].digest == xxhash.xxh3_128_hexdigest(one + two)
    assert ledger[1].tally == Tally(nan=3, changed=3)
    assert ledger[0].tally == Tally()
    ledger.add(0, 0, 0, one, Tally())
    ledger.add(0, 0, 1, one, Tally())
    assert ledger.is_complete
    assert ledger.total() == Tally(nan=3, changed=3)


def test_a_ledger_lists_what_it_has_by_number() -> None:
    segment = Segment(COPY, (), 4, 1)
    tensors = [OutputTensor(f"t{count}", "u8", (4 * count,), 0, 4 * count, (segment,) * count) for count in range(4)]
    files = [OutputFile("f", b"", tuple(tensors[:3]), 12), OutputFile("none", b"", (), 0)]
    files.append(OutputFile("g", b"", tuple(tensors), 24))
    ledger = Ledger(Plan("x", Path(), Path(), False, tuple(files), (), {}, 0))
    for number, file in enumerate(files):
        for place, tensor in enumerate(file.tensors):
            for count in range(len(tensor.segments)):
                ledger.add(number, place, count, bytes([number, place, count, 7] * 4), Tally(changed=place))
    assert list(ledger) == [ledger[number] for number in range(len(ledger))]
    assert [(entry.file, entry.name) for entry in ledger] == [(f.name, t.name) for f in files for t in f.tensors]
    assert [entry.digest for entry in ledger if entry.name == "t1"] == ["00010007" * 4, "02010007" * 4]
    assert ledger[3].digest == xxhash.xxh3_128_hexdigest(b"")
    assert [entry.tally.changed for entry in ledger] == [0, 1, 4, 0, 1, 4, 9]


@pytest.mark.parametrize("name", PLANS)
def test_sizes_are_those_of_the_segments(name: str, tiny: Path, tmp_path: Path) -> None:
    for tensor in PLANS[name](tiny, tmp_path).tensors():
        assert list(sizes_of(tensor)) == [segment.nbytes for segment in tensor.segments]


def test_a_worker_keeps_only_so_many_files_open(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(OPEN_FILES_PER_WORKER + 5)]
    for path in paths:
        path.write_bytes(path.name.encode())
    with DescriptorCache() as cache:
        before = len(os.listdir("/proc/self/fd"))
        for path in (*paths, *paths):
            assert os.pread(cache.get(path, os.O_RDONLY), 10, 0) == path.name.encode()
        assert len(os.listdir("/proc/self/fd")) - before == OPEN_FILES_PER_WORKER


def test_a_short_write_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, memoryview(data)[:7], at))
    path = tmp_path / "file"
    data = bytes(range(100))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    write_all(descriptor, memoryview(data), 3)
    os.close(descriptor)
    assert path.read_bytes() == bytes(3) + data


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, SpaceError), (errno.EDQUOT, SpaceError), (errno.EFBIG, SpaceError), (errno.EIO, InputOutputError)],
)
def test_refusals_of_the_system_are_errors_of_ours_with_the_files_name(number: int, kind: type[Dsv4Error]) -> None:
    with pytest.raises(kind, match=r"^/a/b: cannot be written \("), os_errors(Path("/a/b"), "written"):
        raise OSError(number, os.strerror(number))


def test_the_files_of_a_split_output_are_all_or_the_last_ones(tiny: Path, tmp_path: Path) -> None:
    """Renamed from the last to the first, by which readers find the others."""
    plan = PLANS["split gguf"](tiny, tmp_path)
    renamed: list[str] = []
    real = names._renameat2

    def noting(old: Path, new: Path, flags: int) -> None:
        renamed.append(new.name)
        real(old, new, flags)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(names, "_renameat2", noting)
        execute(plan, threads=2)
    finals = [file.name for file in plan.files]
    assert [name for name in renamed if name in finals] == finals[::-1]
    assert contents(plan).keys() >= set(finals)
