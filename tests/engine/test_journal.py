"""The journal: what is durable before it says so, and what becomes of it when it is damaged."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import threading
from pathlib import Path

import pytest
import xxhash

from dsv4convert.engine.conversion import execute
from dsv4convert.engine.journal import Journal, journal_path
from dsv4convert.engine.outputs import outputs_of
from dsv4convert.errors import OutputExistsError, ResumeError
from dsv4convert.plan import Plan
from dsv4convert.targets.segments import StackedSegments

from .kernel_copies import refuse_kernel_copies
from .plans import PLANS, contents, interrupt, leftovers

DAMAGES = 150


@pytest.fixture
def plan(tiny: Path, tmp_path: Path) -> Plan:
    return PLANS["gguf"](tiny, tmp_path)


def line(fact: object) -> bytes:
    text = json.dumps(fact, separators=(",", ":")).encode()
    return str(xxhash.xxh3_64_hexdigest(text)).encode() + b" " + text + b"\n"


def test_bytes_are_durable_before_the_journal_says_that_they_are_written(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spy on every write: no journal line appears while a byte that it vouches for is not flushed."""
    partial, journal = outputs_of(plan).paths[0], journal_path(plan)
    lock = threading.Lock()
    unflushed: dict[int, int] = {}
    lines = 0
    real_write, real_sync = os.pwrite, os.fdatasync

    def name_of(descriptor: int) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}")

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal lines
        if name_of(descriptor) == str(journal):
            for text in bytes(data).splitlines():
                fact = json.loads(text.partition(b" ")[2])
                if "s" in fact:
                    file, tensor, segment, begin = fact["s"]
                    end = begin + plan.files[file].tensors[tensor].segments[segment].nbytes
                    with lock:
                        assert not [at for at in unflushed if begin <= at < end]
                    lines += 1
            return real_write(descriptor, data, offset)
        if name_of(descriptor) == str(partial):
            with lock:
                unflushed[offset] = memoryview(data).nbytes
        return real_write(descriptor, data, offset)

    def fdatasync(descriptor: int) -> None:
        with lock:
            before = list(unflushed) if name_of(descriptor) == str(partial) else []
        real_sync(descriptor)
        with lock:
            for offset in before:
                unflushed.pop(offset, None)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    refuse_kernel_copies(monkeypatch)  # the test must see the bytes
    execute(plan, threads=2, record_seconds=0.001)
    assert lines == sum(len(tensor.segments) for tensor in plan.files[0].tensors)


@pytest.mark.parametrize("kind", ["flipped", "cut", "zeroed to the end", "a byte too many"])
def test_a_journal_damaged_anywhere_is_refused_or_read_right(plan: Plan, kind: str, tmp_path: Path) -> None:
    """At any byte: an error of ours that names the file and says --fresh, or a resumed run with the right bytes."""
    whole = PLANS["gguf"](plan.source, _folder(tmp_path, "whole"))
    execute(whole, threads=2)
    good = contents(whole)
    interrupt(plan, 30)
    saved = shutil.copytree(tmp_path, tmp_path.parent / f"saved {tmp_path.name}")
    text = journal_path(plan).read_bytes()
    rng = random.Random(kind)
    refused = went_on = 0
    messages: set[str] = set()
    lost_work: list[int] = []  # finished segments in journals whose work could not be told from another run's
    for _ in range(DAMAGES):
        at = rng.randrange(len(text))
        if kind == "flipped":
            damaged = text[:at] + bytes([text[at] ^ 1 << rng.randrange(8)]) + text[at + 1 :]
        elif kind == "cut":
            damaged = text[:at]
        elif kind == "a byte too many":
            damaged = text[:at] + rng.randbytes(1) + text[at:]
        else:
            damaged = text[:at] + bytes(len(text) - at)
        journal_path(plan).write_bytes(damaged)
        try:
            with Journal(journal_path(plan)) as journal:
                known = Journal.finished(journal)
                assert all(entry.task == (*key, entry.task.offset) for key, entry in known.items())
        except (ResumeError, OutputExistsError) as error:
            refused += 1
            messages.add(str(error))
            continue
        went_on += 1
        if went_on % 15 == 0:
            try:
                execute(plan, threads=2, resume=True)
            except ResumeError as error:  # nothing finished, and the copies made here are other inodes than the run's
                lost_work.append(len(known))
                messages.add(str(error))
            else:
                assert contents(plan) == good
            for path in tmp_path.iterdir():
                if path.is_file():
                    path.unlink()
            for path in saved.iterdir():
                if path.is_file():
                    shutil.copy2(path, tmp_path)
    assert refused + went_on == DAMAGES
    next_step = re.compile("--fresh|not a journal of dsv4convert; move that file away")
    assert all(str(tmp_path) in message and next_step.search(message) for message in messages)
    assert not any(lost_work)
    assert went_on > 0
    if kind == "flipped":
        assert refused > DAMAGES // 2


def _folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


def test_written_bytes_of_stacks_are_checked_without_making_their_segments(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stack of 384 experts took 0.3 s: every finished segment of it made all segments anew."""
    everything = sum(len(tensor.segments) for tensor in plan.tensors())
    interrupt(plan, everything - 1)
    path = outputs_of(plan).paths[0]
    with Journal(journal_path(plan)) as journal:
        stacks = [plan.files[0].tensors[tensor].segments for _, tensor, _ in journal.finished()]
        assert any(isinstance(segments, StackedSegments) for segments in stacks)
        monkeypatch.setattr(StackedSegments, "_make", lambda stack, number: pytest.fail("a segment was made"))
        journal.check_bytes(plan, 0, path)


def test_fresh_takes_no_notice_of_a_damaged_journal(plan: Plan) -> None:
    interrupt(plan, 30)
    path = journal_path(plan)
    path.write_bytes(path.read_bytes().replace(b'"d":"', b'"d":"0', 1))
    with pytest.raises(ResumeError, match="line 5: damaged"):
        execute(plan, resume=True)
    execute(plan, threads=2, fresh=True)
    assert leftovers(path.parent) == []


@pytest.mark.parametrize(
    "fact",
    [
        pytest.param({"s": [0, 0, 0], "d": "00" * 16, "n": [0, 0, 0, 0]}, id="a number missing"),
        pytest.param({"s": [0, 0, 0, 0], "d": "00", "n": [0, 0, 0, 0]}, id="a short digest"),
        pytest.param({"s": [0, 0, 0, 0], "d": "zz" * 16, "n": [0, 0, 0, 0]}, id="a digest that is no number"),
        pytest.param({"s": [0, 0, 0, 0], "d": "00" * 16, "n": [0] * 9}, id="too many counts"),
        pytest.param({"s": [0, 0, 1e999, 0], "d": "00" * 16, "n": [0] * 4}, id="infinity"),
        pytest.param({"s": [0, 999, 0, 0], "d": "00" * 16, "n": [0] * 4}, id="no such tensor"),
        pytest.param({"s": [-1, 0, 0, 0], "d": "00" * 16, "n": [0] * 4}, id="a negative file"),
        pytest.param({"s": [0, 0, 10**30, 0], "d": "00" * 16, "n": [0] * 4}, id="no such segment"),
        pytest.param({"inodes": [None]}, id="an inode that is no number"),
        pytest.param(7, id="no object"),
    ],
)
def test_a_forged_line_is_refused(plan: Plan, fact: object) -> None:
    interrupt(plan, 30)
    with journal_path(plan).open("ab") as file:
        file.write(line(fact))
    with pytest.raises(ResumeError, match=r"not a line of a journal|a segment that the plan does not have"):
        execute(plan, resume=True)


@pytest.mark.parametrize(
    "first",
    [
        pytest.param({"journal": 99, "fingerprint": {}}, id="another version"),
        pytest.param({"journal": 1}, id="no fingerprint"),
        pytest.param({"journal": 1, "fingerprint": 7}, id="a fingerprint that is a number"),
        pytest.param({"journal": 1, "fingerprint": {"options": 7, "source": []}}, id="an empty fingerprint"),
        pytest.param([], id="a list"),
    ],
)
def test_a_journal_of_another_kind_is_refused(plan: Plan, first: object) -> None:
    journal_path(plan).write_bytes(line(first))
    with pytest.raises((ResumeError, OutputExistsError), match=r"--fresh|not a journal of dsv4convert"):
        execute(plan, resume=True)


def test_a_journal_that_is_a_link_is_not_followed(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    journal_path(plan).symlink_to(tmp_path / "mine")
    with pytest.raises(OutputExistsError, match="not a regular file"):
        execute(plan, fresh=True)
    assert (tmp_path / "mine").read_text() == "mine"
