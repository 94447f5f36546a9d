"""No room: a clear error, the work kept, and the same bytes once there is room again."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import dsv4convert.engine.conversion as convert_module
from dsv4convert.engine.conversion import execute
from dsv4convert.errors import SpaceError
from dsv4convert.plan import Plan

from ..command_line import run_cli
from .kernel_copies import refuse_kernel_copies
from .plans import MERGES, PLANS, contents, leftovers

SMALL_DISK = "3m"  # less than the 4.4 MB of the output
LARGE_DISK = "16m"


@pytest.fixture
def whole(tiny: Path, tmp_path: Path) -> Plan:
    (tmp_path / "whole").mkdir()
    plan = PLANS["gguf"](tiny, tmp_path / "whole")
    execute(plan, threads=2)
    return plan


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_too_small_for_the_plan_is_told_before_anything_is_written(tiny: Path, small_disk: Path) -> None:
    result = run_cli("hf-to-gguf", tiny, small_disk / "model.gguf")
    assert result.code == 10
    assert "not enough disk space for the output: expected 4" in result.error
    assert list(small_disk.iterdir()) == []


# The command line's options for plans whose output is larger than the small disk.
OPTIONS = {
    "gguf": [],
    "low-bit gguf": ["--dense", "q4_0", "--experts", "q5_0", "--output-type", "f32"],
}


@pytest.mark.parametrize("target", OPTIONS)
def test_a_disk_that_fills_up_during_the_run(
    target: str, tiny: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else takes the room: the check before the run saw enough."""
    (tmp_path / "whole").mkdir()
    whole = PLANS[target](tiny, tmp_path / "whole")
    execute(whole, threads=2)
    command = ["hf-to-gguf", tiny, small_disk / "model.gguf", *OPTIONS[target]]
    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "check_space", lambda *args: None)
        result = run_cli(*command)
    assert result.code == 10
    assert "No space left on device" in result.error
    assert "(while making tensor " in result.error
    assert result.error.endswith("free some space and run again; the finished work is kept: run again with --resume")
    assert leftovers(small_disk) == ["model.gguf.journal", "model.gguf.partial"]

    again = run_cli(*command, "--resume")
    assert (again.code, leftovers(small_disk)) == (10, ["model.gguf.journal", "model.gguf.partial"])

    subprocess.run(["mount", "-o", f"remount,size={LARGE_DISK}", small_disk], check=True)
    plan = PLANS[target](tiny, small_disk)
    execute(plan, threads=2, resume=True)
    assert contents(plan) == contents(whole)
    assert leftovers(small_disk) == []


# A merge has a write for each of its 126 tensors and few besides.
ROOMS = {"gguf": 140, "low-bit gguf": 140, "dequantize": 140, **dict.fromkeys(MERGES, 120)}


@pytest.mark.parametrize(
    ("target", "room"), [(target, room) for target, most in ROOMS.items() for room in (0, 1, 2, 3, 50, 100, most)]
)
def test_a_write_that_finds_no_room_can_be_any(
    target: str, room: int, tiny: Path, fast_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fast_tmp / "whole").mkdir()
    whole = {**PLANS, **MERGES}[target](tiny, fast_tmp / "whole")
    execute(whole, threads=2)
    (fast_tmp / "out").mkdir()
    plan = {**PLANS, **MERGES}[target](tiny, fast_tmp / "out")
    lock = threading.Lock()
    left = room
    real = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal left
        with lock:
            left -= 1
        if left < 0:
            if left == -1 and memoryview(data).nbytes > 1:
                return real(descriptor, memoryview(data)[: memoryview(data).nbytes // 2], offset)  # the last that fits
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        refuse_kernel_copies(patch)
        with pytest.raises(SpaceError, match=r"\(No space left on device\).*free some space and run again"):
            execute(plan, threads=2, record_seconds=0.001)
    # Only the manifest may be what had no room; then the output is whole.
    for path, good in zip(plan.final_paths(), whole.final_paths(), strict=True):
        assert not path.exists() or path.read_bytes() == good.read_bytes()
    execute(plan, threads=2, resume=True)
    assert contents(plan) == contents(whole)
    assert leftovers(plan.output_path().parent) == []


def told_by_limited_run(program: str, source: Path, out: Path) -> str:
    """Run a program that limits the size of files, then converts to GGUF; return what it told on stderr."""
    ended = subprocess.run(
        [sys.executable, "-c", program, "hf-to-gguf", source, out],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 10
    assert "File too large" in ended.stderr
    return ended.stderr


def test_a_limit_on_file_sizes_is_told_and_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))\n"
        "from dsv4convert.cli import main; main()"
    )
    told = told_by_limited_run(program, tiny, tmp_path / "model.gguf")
    assert len(told.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_limit_on_file_sizes_in_the_middle_of_a_run(tiny: Path, tmp_path: Path, whole: Plan) -> None:
    """The limit comes when the files have their size, so that the journal is what grows beyond it."""
    program = (
        "import resource\n"
        "import dsv4convert.engine.conversion as convert\n"
        "start = convert._start\n"
        "def limited(*args):\n"
        "    start(*args)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "convert._start = limited\n"
        "from dsv4convert.cli import main; main()"
    )
    told = told_by_limited_run(program, tiny, tmp_path / "model.gguf")
    assert "--resume" in told
    plan = PLANS["gguf"](tiny, tmp_path)
    execute(plan, threads=2, resume=True)
    assert contents(plan) == contents(whole)
