"""Whatever ends a run, and whenever: the next one goes on to the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..checkpoints import MakeCheckpoint
from .crash import PLANS

# Deaths for each target. A child lives some ten milliseconds, so the moments are spread over all that a run does.
KILLS = 20
STEPS = 40
POWER_FAILURES = 40


def crash(target: str, source: Path, folder: Path, mode: str, runs: int) -> dict[str, Any]:
    program = [sys.executable, "-m", "tests.engine.crash", target, str(source), str(folder / "crash")]
    ended = subprocess.run(
        [*program, "--mode", mode, "--runs", str(runs)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    report: dict[str, Any] = json.loads(ended.stdout)
    return report


def contents_and_places(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_ino) for path in folder.iterdir()}


@pytest.mark.parametrize("target", PLANS)
@pytest.mark.parametrize(
    ("mode", "runs"),
    [("kill", KILLS), ("step", STEPS), ("power", POWER_FAILURES)],
    ids=["killed at a random moment", "killed before a system call", "power loss before a system call"],
)
def test_a_run_that_died_goes_on_to_the_same_bytes(
    target: str, mode: str, runs: int, make_checkpoint: MakeCheckpoint, fast_tmp: Path
) -> None:
    # On the file system of the output, so that it can share files.
    source = shutil.copytree(make_checkpoint("tiny", files=3), fast_tmp / "source")
    before = contents_and_places(source)
    report = crash(target, source, fast_tmp, mode, runs)
    assert contents_and_places(source) == before
    assert report["wrong"] == []
    assert report["died"] >= runs
    # Some died late enough to have something recorded, which the next run did not make again.
    assert report["resumed"] > 0
