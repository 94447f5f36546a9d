"""Memory stays under 256 MiB whatever the model's size and the number of ranks, with two threads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsv4convert.containers.safetensors import read_header

from ..checkpoints import MakeCheckpoint

LIMIT_BYTES = 256 * 2**20

# The command itself, on files of the true sizes that take no room: every worker really makes its first
# segments of each kind, so that its buffers grow to their size, and then only pretends to. What grows
# with the model (the plan, the journal, the report and the manifest) is all there. The high-water mark is
# that of the process: ru_maxrss would start at the parent's.
PROGRAM = """
import re, sys, time
from dsv4convert.engine import conversion
from dsv4convert.cli import main
from dsv4convert.engine import run as engine
from dsv4convert.engine.journal import Journal
from dsv4convert.engine.worker import Made, Worker
from dsv4convert.formats.base import Tally
from dsv4convert.plan import Copy

really, record, calls = Worker.run, Journal.record, set()
made = recorded = 0

def run(self, segment, output, path, offset):
    global made
    kind = self, segment.operation, segment.row_bytes
    if segment.nbytes < 2**27 and kind not in calls:
        calls.add(kind)
        return really(self, segment, output, path, offset)
    made += 1
    digest = offset.to_bytes(16, "little")
    if isinstance(segment.operation, Copy) and segment.operation.is_repeated:
        self._copies[segment] = Made(digest, Tally())
    # In earnest a few hundred segments are made between two entries of the journal.
    while made - recorded > 1000 and not self.stopped:
        time.sleep(0.001)
    return Made(digest, Tally())

def record_and_count(self, batch):
    global recorded
    record(self, batch)
    recorded += len(batch)

if sys.argv.pop(1) == "pretend":
    Worker.run, Journal.record = run, record_and_count
    conversion.check_space = lambda *_: None
    engine.POLL_SECONDS = conversion.execute.__kwdefaults__["record_seconds"] = 0.01
try:
    main()
finally:
    status = open("/proc/self/status").read()
    sys.stderr.write(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])
"""


def peak_bytes(mode: str, *arguments: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode, *arguments, "--threads", "2", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tensors"] > 100
    return int(done.stderr) * 1024


@pytest.mark.parametrize("expert_dtype", ["fp4", "fp8"])
def test_there_and_back_with_a_quarter_of_a_gigabyte(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, expert_dtype: str
) -> None:
    source, out = make_checkpoint("nano", layers=3), tmp_path / "out"
    assert sum(path.stat().st_size for path in source.iterdir()) > LIMIT_BYTES
    there = peak_bytes("really", "shard", str(source), str(out), "--mp", "4", "--experts", expert_dtype)
    back = peak_bytes("really", "unshard", str(out), str(tmp_path / "back"))
    assert max(there, back) < LIMIT_BYTES


def write_tables(folder: Path) -> None:
    """Give shards that were only pretended routing tables that a model can have."""
    for path in folder.glob("*.safetensors"):
        for name, stored in read_header(path).items():
            if name.endswith(".tid2eid"):
                with path.open("r+b") as file:
                    file.seek(stored.offset)
                    file.write(np.tile(np.arange(stored.shape[1], dtype="<i8"), stored.shape[0]).tobytes())


@pytest.mark.slow
@pytest.mark.parametrize("mp", [8, 16])
def test_v4_pro_on_many_ranks(make_checkpoint: MakeCheckpoint, tmp_path: Path, mp: int) -> None:
    source, out = make_checkpoint("pro", headers_only=True), tmp_path / "out"
    assert peak_bytes("pretend", "shard", str(source), str(out), "--mp", str(mp)) < LIMIT_BYTES
    write_tables(out)
    assert peak_bytes("pretend", "unshard", str(out), str(tmp_path / "back")) < LIMIT_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("mp", [8, 16])
def test_v4_pro_with_fp8_experts(make_checkpoint: MakeCheckpoint, tmp_path: Path, mp: int) -> None:
    source, out = make_checkpoint("pro", headers_only=True), tmp_path / "out"
    options = ("--mp", str(mp), "--experts", "fp8")
    assert peak_bytes("pretend", "shard", str(source), str(out), *options) < LIMIT_BYTES
