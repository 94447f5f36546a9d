"""Memory stays under a few hundred MiB whatever the model's size, with two threads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4convert.targets.engram_tables import ENGRAM_TYPES

from ..checkpoints import MakeCheckpoint

MEBIBYTE = 2**20
# Arguments, the output's name, and the limit in MiB.
COMMANDS = {
    "gguf": (["hf-to-gguf"], "out.gguf", 256),
    "gguf and its draft": (["hf-to-gguf", "--draft", "split", "--split-max-size", "45G"], "out.gguf", 256),
    "low-bit gguf": (["hf-to-gguf", "--dense", "q4_0", "--experts", "q4_0"], "out.gguf", 256),
    "dequantize": (["dequantize"], "out", 300),
    "transformers": (["dequantize", "--names", "transformers"], "out", 300),
    "repack": (["repack", "--experts", "fp8"], "out", 300),
    "nvfp4": (["repack", "--experts", "nvfp4", "--draft-experts"], "out", 256),
    "mend": (["mend", "--drop-draft"], "out", 256),
    "mend and rename": (["mend", "--rename", "transformers"], "out", 256),
    "mlx": (["mlx"], "out", 256),
    "maxtext": (["maxtext"], "out", 256),
}

# The command line itself, on files of the true sizes that take no room: each worker really makes its
# first segments, so that its buffers grow to their size, and then only pretends to. What grows with
# the model, the plan, the journal, the report and the manifest, is all there.
PRETEND = """
import time
import dsv4convert.engine.conversion
from dsv4convert.cli import main
from dsv4convert.engine.worker import Made, Worker
from dsv4convert.formats.base import Tally

really, seen = Worker.run, set()

def run(self, segment, output, path, offset):
    kind = id(self), segment.operation, segment.row_bytes
    if kind not in seen and segment.nbytes < 2**26:
        seen.add(kind)
        return really(self, segment, output, path, offset)
    if offset // 64 % 8 == 0:
        time.sleep(5e-5)  # let the main thread record what is finished, as it can when the work is real
    return Made(offset.to_bytes(16, "little"), Tally())

Worker.run = run
Worker.look = lambda self, segment, output, path, offset: Made(offset.to_bytes(16, "little"), Tally())
dsv4convert.engine.conversion.check_space = lambda *_: None
dsv4convert.engine.conversion.execute.__kwdefaults__["record_seconds"] = 0.2
main()
"""


def peak_bytes(program: list[str], arguments: list[str]) -> int:
    done = subprocess.run(
        [sys.executable, *program, *arguments, "--threads", "2", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["peak_memory_bytes"])


def check_peak(program: list[str], command: tuple[list[str], str, int], source: Path, folder: Path) -> None:
    arguments, out, limit = command
    assert peak_bytes(program, [*arguments, str(source), str(folder / out)]) < limit * MEBIBYTE


@pytest.mark.parametrize("command", COMMANDS)
def test_a_few_hundred_megabytes_of_weights(command: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("nano", layers=3)
    check_peak(["-m", "dsv4convert"], COMMANDS[command], source, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_hundred_and_forty_thousand_tensors(command: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("pro", headers_only=True)
    check_peak(["-c", PRETEND], COMMANDS[command], source, tmp_path)


# V4.1: the whole model's plan and journal, and an n-gram table of a quarter of a gigabyte in every encoding.
V41_COMMANDS = {
    "gguf": (["hf-to-gguf", "--engram", "i8-row264"], "out.gguf", 300),
    "shards": (["shard", "--mp", "8"], "out", 300),
    "dequantize": (["dequantize"], "out", 300),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", V41_COMMANDS)
def test_the_whole_of_v41(command: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("v41-flash", headers_only=True)
    check_peak(["-c", PRETEND], V41_COMMANDS[command], source, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENGRAM_TYPES)
def test_an_n_gram_table_of_a_quarter_of_a_gigabyte(
    encoding: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    overrides = {"engram_head_dim": 256, "engram_n_heads": 8, "engram_max_ngram_size": 4}
    source = make_checkpoint("v41-tiny", layers=1, mtp=False, experts=2, engram_rows=10**6, overrides=overrides)
    arguments = ["hf-to-gguf", "--engram", encoding, str(source), str(tmp_path / "out.gguf")]
    assert peak_bytes(["-m", "dsv4convert"], arguments) < 160 * MEBIBYTE
