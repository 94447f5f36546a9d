"""Advice to the system: what one worker reads next is asked for before its turn, and tasks stay as they were."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dsv4convert.engine.conversion import execute
from dsv4convert.engine.read_ahead import AHEAD_BYTES, read_ahead
from dsv4convert.plan import COPY, JOIN, Operand, Segment

from .plans import PLANS


class Advice(NamedTuple):
    """A range of a file that was asked for."""

    file: str
    offset: int
    nbytes: int


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Advice]:
    """Return the list of what the system is asked for from here on."""
    found: list[Advice] = []
    advise = os.posix_fadvise

    def noting(descriptor: int, offset: int, nbytes: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            found.append(Advice(os.readlink(f"/proc/self/fd/{descriptor}"), offset, nbytes))
        advise(descriptor, offset, nbytes, advice)

    monkeypatch.setattr(os, "posix_fadvise", noting)
    return found


def segment_at(path: Path, offset: int, nbytes: int) -> Segment:
    """Return a segment that reads ``nbytes`` of a file, and a sixteenth of it as scales."""
    scales = Operand(path, 2**40 + offset, nbytes // 16, 1, "u1")
    return Segment(JOIN, (Operand(path, offset, nbytes, 1, "u1"), scales), 1, nbytes)


@pytest.mark.parametrize("nbytes", [2**20, 5 * 2**20, 40 * 2**20], ids=["small", "an expert's", "large"])
def test_the_next_sixteen_mebibytes_are_asked_for_and_no_more(nbytes: int, tmp_path: Path, asked: list[Advice]) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    segments = [segment_at(path, number * nbytes, nbytes) for number in range(60)]
    size = nbytes + nbytes // 16
    yielded = []
    for number in read_ahead(iter(range(60)), segments.__getitem__):
        yielded.append(number)
        known = len(asked) // 2  # of each segment two operands
        following = (known - 1 - number) * size  # bytes that are asked for and lie behind this segment
        assert known == 60 or following >= AHEAD_BYTES
        assert following < AHEAD_BYTES + size
    assert yielded == list(range(60))
    assert asked == [
        Advice(str(path), operand.offset, min(operand.row_bytes, AHEAD_BYTES))
        for segment in segments
        for operand in segment.operands
    ]


def test_a_file_that_cannot_be_opened_is_left_to_the_worker(tmp_path: Path, asked: list[Advice]) -> None:
    segments = [segment_at(tmp_path / "gone", 0, 2**20)] * 3 + [Segment(COPY, (), 0, 1)]
    assert list(read_ahead(iter(range(4)), segments.__getitem__)) == [0, 1, 2, 3]
    assert asked == []


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("threads", [1, 2])
def test_one_worker_alone_has_all_operands_asked_for(
    threads: int, name: str, tiny: Path, tmp_path: Path, asked: list[Advice]
) -> None:
    plan = PLANS[name](tiny, tmp_path)
    execute(plan, threads=threads)
    read: Any = {(str(operand.file), operand.offset) for segment in plan.segments() for operand in segment.operands}
    assert {advice[:2] for advice in asked} == (read if threads == 1 else set())
