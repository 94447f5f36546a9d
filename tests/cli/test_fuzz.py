"""Damaged files by the thousand: each ends in one of our errors or in success (see ``fuzz``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .fuzz import KINDS, MEMORY_LIMIT, SECONDS_PER_CASE

CASES = {
    "header": 8000,
    "index": 2500,
    "config": 3000,
    "tokenizer": 3000,
    "tokenizer_config": 1000,
    "generation_config": 500,
    "gguf": 3500,
    "manifest": 2500,
    "journal": 2500,
    "checkpoint": 2500,
    "shards": 700,
}
# Other cases on another day: DSV4_FUZZ_SEED=$RANDOM.
SEED = os.environ.get("DSV4_FUZZ_SEED", "0")

SUCCESSES = {"read", "agrees", "differs", "resumed", "planned", "converted"}
CONVERTING = ("journal", "checkpoint", "shards")
# What only describes is a note when it is damaged, and never an error.
DESCRIBING = ("generation_config",)


def test_there_are_twenty_thousand_cases_of_every_kind() -> None:
    assert sum(CASES.values()) >= 20_000
    assert set(CASES) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_end_in_our_errors_or_in_success(kind: str, fast_tmp: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.cli.fuzz", kind, fast_tmp, "--cases", str(CASES[kind]), "--seed", SEED],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(fast_tmp)},
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    report: dict[str, Any] = json.loads(ended.stdout)
    assert report["failures"] == []
    assert report["failed"] == 0
    assert report["cases"] == CASES[kind]
    assert report["slowest"] < SECONDS_PER_CASE
    assert report["peak"] < MEMORY_LIMIT
    accepted = sum(count for outcome, count in report["outcomes"].items() if outcome in SUCCESSES)
    if kind in DESCRIBING:
        assert accepted == CASES[kind]
    else:
        # Neither all let through nor all refused: both halves of the promise were put to the test.
        assert 0 < accepted < CASES[kind]
    if kind in CONVERTING:
        assert report["converted"] > 0
