"""``verify`` streams: its memory does not grow with the tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4convert.engine.conversion import execute
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions

from ..checkpoints import MakeCheckpoint

# 70 MiB are measured, of which the interpreter and its libraries take 60; source and output are 450 MB each.
MEMORY_LIMIT = 160 * 2**20

PROGRAM = """
import json, sys
from pathlib import Path
from dsv4convert.engine.run import peak_memory_bytes
from dsv4convert.verification import verify
report = verify(Path(sys.argv[1]), Path(sys.argv[2]), threads=2)
print(json.dumps({"ok": report.ok, "peak": peak_memory_bytes()}))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tensors(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("nano")
    execute(plan_gguf(source, tmp_path / "x.gguf", GgufOptions()), threads=2)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(source), str(tmp_path / "x.gguf")],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout)
    assert result["ok"]
    assert result["peak"] < MEMORY_LIMIT
