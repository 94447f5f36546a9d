"""Ctrl-C and its polite relatives stop a run within a second, keep the work and say how to go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ..command_line import run_cli
from .plans import leftovers

# Slow tiles, so that a tiny conversion takes seconds; frequent records, so that some work is kept.
SLOW = """
import sys, time
import dsv4convert.engine.worker as tiles
import dsv4convert.engine.conversion as convert
from dsv4convert.engine.compiled_segments import CompiledSegment, CompiledSegments
from dsv4convert.__main__ import main
def slowly(function):
    def slow(*args):
        time.sleep(0.05)
        return function(*args)
    return slow
tiles.write_all = slowly(tiles.write_all)
tiles.KernelCopier.copy = tiles.KernelCopier.copy_and_show = lambda *args: 0
CompiledSegment.make = slowly(CompiledSegment.make)
execute = convert.execute
convert.execute = lambda *args, **options: execute(*args, **options, record_seconds=0.1)
{more}
main()
"""
IN_PYTHON = "CompiledSegments.begin = lambda *args, **options: None"
STUCK_DISK = """
from dsv4convert.engine.outputs import Outputs
Outputs.sync = lambda *args: time.sleep(60)
"""
STOPS_WITHIN = 1.0
STARTS_WITHIN = 30.0


def default_signals() -> None:
    """Undo what a shell does to a background job, or nohup: their children ignore these signals."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(*arguments: object, more: str = "", before: Callable[[], None] = lambda: None) -> subprocess.Popen[str]:
    """Start a slow run, with ``more`` lines of Python in it, after ``before`` has been called in its process."""

    def prepare() -> None:
        default_signals()
        before()

    return subprocess.Popen(
        [sys.executable, "-c", SLOW.format(more=more), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=prepare,
    )


def wait_for(path: Path, text: bytes) -> None:
    until = time.monotonic() + STARTS_WITHIN
    while not path.exists() or text not in path.read_bytes():
        assert time.monotonic() < until, f"no {text!r} in {path}"
        time.sleep(0.01)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["Ctrl-C", "terminate", "hang up"]
)
def test_a_signal_stops_the_run_within_a_second_and_the_work_is_kept(
    number: signal.Signals, tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model.gguf"
    more = IN_PYTHON if number == signal.SIGTERM else ""
    process = start("hf-to-gguf", tiny, out, "--threads", "2", more=more)
    wait_for(tmp_path / "model.gguf.journal", b'{"s":')
    began = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert time.monotonic() - began < STOPS_WITHIN
    assert process.returncode == 130
    assert err == f"error: {out}: interrupted; the finished work is kept: run again with --resume\n"
    assert leftovers(tmp_path) == ["model.gguf.journal", "model.gguf.partial"]
    assert not out.exists()

    resumed = run_cli("hf-to-gguf", tiny, out, "--resume", "--json")
    assert json.loads(resumed.out)["resumed_bytes"] > 0
    (tmp_path / "whole").mkdir()
    run_cli("hf-to-gguf", tiny, tmp_path / "whole" / "model.gguf")
    for name in ("model.gguf", "model.gguf.manifest.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_disk_that_takes_its_time_over_a_flush_does_not_hold_up_ctrl_c(tiny: Path, tmp_path: Path) -> None:
    process = start("hf-to-gguf", tiny, tmp_path / "model.gguf", "--threads", "2", more=STUCK_DISK)
    wait_for(tmp_path / "model.gguf.journal", b'"inodes"')
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert time.monotonic() - began < STOPS_WITHIN
    assert process.returncode == 130
    assert "--resume" in err
    assert run_cli("hf-to-gguf", tiny, tmp_path / "model.gguf", "--resume").code == 0


def test_ctrl_c_while_planning_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    stuck = "gguf.load_tokenizer = lambda *args: time.sleep(60)"
    more = f"import dsv4convert.targets.gguf as gguf\n{stuck}\nprint('planning', flush=True)"
    process = start("hf-to-gguf", tiny, tmp_path / "model.gguf", more=more)
    assert process.stdout is not None
    assert process.stdout.readline() == "planning\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "error: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_nohup_stays_in_force(tiny: Path, tmp_path: Path) -> None:
    program = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", program + SLOW.format(more=""), "hf-to-gguf", str(tiny), str(tmp_path / "model.gguf")],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(tmp_path / "model.gguf.journal", b'{"s":')
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0
