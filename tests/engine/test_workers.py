"""A worker that fails ends the whole run at once, with the tensor's name, and never half a result."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dsv4convert.engine.conversion import execute
from dsv4convert.engine.journal import Journal
from dsv4convert.engine.worker import Worker
from dsv4convert.errors import InventoryError, LossyError, SpaceError
from dsv4convert.plan import Plan, Segment

from .plans import PLANS, failing_after, leftovers

PROMPTLY = 5.0


@pytest.fixture
def plan(tiny: Path, tmp_path: Path) -> Plan:
    return PLANS["gguf"](tiny, tmp_path)


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_of_ours_keeps_its_kind_and_gains_the_tensors_name(plan: Plan, threads: int) -> None:
    error = LossyError("not exact", where="here", expected=1, got=2, hint="do that")
    told = r"^here: not exact \(while making tensor \S+\): expected 1, got 2; do that$"
    began = time.monotonic()
    with failing_after(10, error), pytest.raises(LossyError, match=told):
        execute(plan, threads=threads)
    assert time.monotonic() - began < PROMPTLY
    assert list(plan.destination.iterdir()) == []


def test_a_bug_in_a_codec_is_told_with_the_tensors_name(plan: Plan) -> None:
    told = f"while making tensor {plan.files[0].tensors[10].name}: ZeroDivisionError: oops"
    with failing_after(10, ZeroDivisionError("oops")), pytest.raises(RuntimeError, match=told):
        execute(plan, threads=1)
    assert not plan.final_paths()[0].exists()


def test_too_little_memory_is_an_error_of_ours(plan: Plan) -> None:
    told = r"not enough memory for tensor \S+; use fewer --threads"
    with failing_after(10, MemoryError()), pytest.raises(SpaceError, match=told):
        execute(plan, threads=1)


def test_a_worker_that_cannot_even_begin_ends_the_run(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(self: Worker, *_: object, **__: object) -> None:
        raise ValueError("no buffers")

    monkeypatch.setattr(Worker, "__init__", no_memory)
    with pytest.raises(ValueError, match="no buffers"):
        execute(plan, threads=2)
    assert not plan.final_paths()[0].exists()


def test_the_other_workers_stop_at_the_next_tile(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Worker.run
    first = threading.Event()
    tiles_made = 0

    def one_fails(self: Worker, segment: Segment, output: int, path: Path, offset: int) -> Any:
        nonlocal tiles_made
        if not first.is_set():
            first.set()
            time.sleep(0.2)
            raise InventoryError("bad")
        while not self.stopped:  # a segment of very many tiles
            tiles_made += 1
            time.sleep(0.01)
        return run(self, segment, output, path, offset)

    monkeypatch.setattr(Worker, "run", one_fails)
    began = time.monotonic()
    with pytest.raises(InventoryError, match="bad"):
        execute(plan, threads=3)
    assert time.monotonic() - began < PROMPTLY
    assert tiles_made > 0


def test_a_segment_that_was_stopped_in_the_middle_is_not_recorded(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Worker.run
    begun = threading.Barrier(2)

    def half(self: Worker, segment: Segment, output: int, path: Path, offset: int) -> Any:
        number = begun.wait(10)
        if number == 0:
            raise SpaceError("full")
        while not self.stopped:
            time.sleep(0.001)
        return run(self, segment, output, path, offset)

    monkeypatch.setattr(Worker, "run", half)
    with pytest.raises(SpaceError):
        execute(plan, threads=2)
    with Journal(plan.output_path().with_name("model.gguf.journal")) as journal:
        assert journal.finished() == {}


def test_a_recorder_that_fails_ends_the_run(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Journal, batch: object) -> None:
        raise SpaceError("the journal is full")

    monkeypatch.setattr(Journal, "record", full)
    with pytest.raises(SpaceError, match=r"the journal is full; the finished work is kept"):
        execute(plan, threads=2, record_seconds=0.001)
    assert leftovers(plan.destination) == ["model.gguf.journal", "model.gguf.partial"]
