"""Power cuts at the block level, replayed on ext4; ``python -m tests.engine.power_cuts`` makes more, on XFS too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .commands import USES_UP
from .power_cuts import EXT4, UNABLE

COMMANDS = ("hf-to-gguf --max-file-size", USES_UP)
# Cuts of each command without an older output and with one.
CUTS = 8


def power_cuts(folder: Path, *options: str) -> dict[str, Any]:
    """Run the program, where the system lets it make disks; return its record."""
    for program in (EXT4.make[0], EXT4.check[0]):
        if shutil.which(program) is None:
            pytest.skip(f"no {program}")
    if os.geteuid() != 0:
        pytest.skip("not root")
    record = folder / "record.json"
    arguments = ["--file-systems", "ext4", "--commands", *COMMANDS, "--cuts", str(CUTS), "--save", str(record)]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.engine.power_cuts", str(folder / "disks"), *arguments, *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if ended.returncode == UNABLE:
        pytest.skip(ended.stderr)
    assert ended.returncode == 0, ended.stderr[-2000:]
    result: dict[str, Any] = json.loads(record.read_text())
    return result


def test_after_a_power_cut_nothing_is_wrong_and_resume_finishes(fast_tmp: Path) -> None:
    record = power_cuts(fast_tmp)
    (system,) = record["file_systems"]
    assert system["wrong"] == []
    assert record["cuts"] == 2 * CUTS * len(COMMANDS)
    # The cuts fell into the work: some left finished parts, which a resumed run does not make again.
    assert any("finished parts" in state for case in system["cases"] for state in case["states"])


def test_a_power_cut_that_loses_what_fsync_promised_is_found(fast_tmp: Path) -> None:
    """Control: the checks see what a program without fsync would lose."""
    assert power_cuts(fast_tmp, "--lying")["wrong"] > 0
