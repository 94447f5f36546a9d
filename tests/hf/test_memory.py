"""Memory stays under 300 MiB whatever the model's size, with two threads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import MakeCheckpoint

LIMIT_BYTES = 300 * 2**20
COMMANDS = {
    "dequantize": ["dequantize"],
    "transformers": ["dequantize", "--names", "transformers"],
    "repack": ["repack", "--experts", "fp8"],
}

# The command line itself, on files of the true sizes that take no room: each worker really makes its
# first segments, so that its buffers grow to their size, and then only pretends to. What grows with
# the model, the plan, the journal, the report and the manifest, is all there.
PRETEND = """
import time
import dsv4convert.convert
from dsv4convert.cli import main
from dsv4convert.engine.tiles import Worker
from dsv4convert.formats.base import Tally

really, seen = Worker.run, set()

def run(self, segment, path, offset):
    kind = id(self), segment.codec, segment.row_bytes
    if kind not in seen and segment.nbytes < 2**26:
        seen.add(kind)
        return really(self, segment, path, offset)
    time.sleep(5e-5)  # let the main thread record what is finished, as it can when the work is real
    return offset.to_bytes(16, "little"), Tally()

Worker.run = run
dsv4convert.convert.check_space = lambda *_: None
dsv4convert.convert.execute.__kwdefaults__["record_seconds"] = 0.2
main()
"""


def peak_bytes(program: list[str], arguments: list[str]) -> int:
    done = subprocess.run(
        [sys.executable, *program, *arguments, "--threads", "2", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["peak_memory_bytes"])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_few_hundred_megabytes_of_weights(command: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("nano", layers=3)
    arguments = [*COMMANDS[command], str(source), str(tmp_path / "out")]
    assert peak_bytes(["-m", "dsv4convert"], arguments) < LIMIT_BYTES


# The compiled codecs are compiled once after an installation, which takes memory of its own; see the docs.
COMPILE = """
import numpy as np
from dsv4convert.formats.backend import compiled_available, compiled_codecs
from dsv4convert.formats.base import Scratch, Tally

if compiled_available():
    codecs, scratch, tally = compiled_codecs(), Scratch(), Tally()
    bytes_of = lambda *shape: np.full(shape, 100, np.uint8)
    codecs.fp8_to_bf16(bytes_of(128, 256), bytes_of(1, 2), (128, 128), np.empty((128, 256), np.uint16), scratch, tally)
    codecs.fp4_to_bf16(bytes_of(128, 128), bytes_of(128, 8), (1, 32), np.empty((128, 256), np.uint16), scratch, tally)
    codecs.fp4_to_fp8(bytes_of(128, 128), bytes_of(128, 8), bytes_of(128, 256), bytes_of(1, 2), scratch, tally)
"""


@pytest.fixture(scope="module")
def compiled() -> None:
    """Compile the codecs in another process, as a first run does."""
    subprocess.run([sys.executable, "-c", COMPILE], check=True)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_hundred_and_forty_thousand_tensors(command: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("pro", headers_only=True)
    arguments = [*COMMANDS[command], str(source), str(tmp_path / "out")]
    assert peak_bytes(["-c", PRETEND], arguments) < LIMIT_BYTES
