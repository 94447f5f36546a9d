"""What a run is seen to do from outside: bytes by thread over time, and what threads wait for."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from dsv4convert.engine import monitor
from dsv4convert.engine.monitor import MAX_SAMPLES, Monitor, Timeline
from dsv4convert.engine.names import kind_of_file_system


def test_a_long_run_keeps_few_samples_and_both_ends() -> None:
    line = Timeline()
    started = time.monotonic()
    for second in range(10_000):
        line.add([second * 10, second * 20], now=started + second)
    made = line.as_json()
    assert MAX_SAMPLES / 4 < len(made["seconds"]) <= MAX_SAMPLES + 1
    assert made["seconds"] == sorted(made["seconds"])
    assert [counts[0] for counts in made["threads"]] == [0, 0]
    assert [counts[-1] for counts in made["threads"]] == [99_990, 199_980]


def test_runs_one_after_another_add_up() -> None:
    line = Timeline()
    started = time.monotonic()
    for second, counts in enumerate(([0], [5], [10], [0, 0], [3, 4])):
        line.add(counts, now=started + second)
    assert line.as_json()["threads"] == [[0, 5, 10, 10, 13], [0, 0, 0, 0, 4]]


def test_a_time_line_begins_with_the_run() -> None:
    line = Timeline()
    planned = time.monotonic() + 1000
    for second, counts in enumerate(([0, 0], [5, 7], [10, 14])):
        line.add(counts, now=planned + second)
    assert line.as_json() == {"seconds": [0, 1, 2], "threads": [[0, 5, 10], [0, 7, 14]]}


def test_a_time_line_of_nothing_is_empty() -> None:
    assert Timeline().as_json() == {"seconds": [], "threads": []}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system does not tell what a thread is at")
def test_a_thread_that_computes_and_one_that_sleeps_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(monitor, "any_mounted", lambda: False)  # as other tests may have left it
    ending = threading.Event()

    def compute() -> None:
        content = bytes(2**20)
        while not ending.is_set():
            hashlib.sha256(content)  # without the interpreter's lock, for which a thread would wait asleep

    busy, asleep = threading.Thread(target=compute), threading.Thread(target=ending.wait)
    for thread in (busy, asleep):
        thread.start()
    try:
        computing, waiting = Monitor([busy], [tmp_path]), Monitor([asleep], [tmp_path])
        for _ in range(200):
            time.sleep(0.002)
            shares, others = computing.waiting(), waiting.waiting()
    finally:
        ending.set()
        busy.join()
        asleep.join()
    assert shares is not None
    assert shares.processor > 0.25
    assert others is not None
    assert others.most == "other"
    assert others.other > 0.75
    # Threads that have ended tell nothing more.
    assert Monitor([busy], [tmp_path]).waiting() is None


def test_waiting_for_a_device_is_for_the_network_where_the_files_lie_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Monitor, "_state", lambda self, thread: self._device)
    here = Monitor([threading.current_thread()], [tmp_path]).waiting()
    assert here is not None
    assert here.disk == 1
    monkeypatch.setattr(monitor, "kind_of_file_system", lambda path: "nfs4")
    there = Monitor([threading.current_thread()], [tmp_path]).waiting()
    assert there is not None
    assert there.network == 1


def test_the_kind_of_a_file_system_is_that_of_its_mount() -> None:
    if not os.path.ismount("/proc"):
        pytest.skip("no /proc is mounted")
    assert kind_of_file_system(Path("/proc/self/status")) == "proc"
