"""Conversions on a Ray cluster: the bytes of one machine, whatever dies meanwhile; real Ray with two workers."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dsv4convert import api
from dsv4convert.engine import cluster as cluster_module
from dsv4convert.engine.cluster import Cluster, cut, work_of_a_task
from dsv4convert.engine.cluster_bridge import Done
from dsv4convert.engine.cluster_worker import PAGE_BYTES, Piece, make_piece
from dsv4convert.engine.conversion import execute
from dsv4convert.engine.journal import Journal, journal_path
from dsv4convert.engine.monitor import Step
from dsv4convert.engine.worker import Worker
from dsv4convert.errors import DeviceError, Dsv4Error, FileFormatError, InputOutputError, LockedError
from dsv4convert.plan import Plan
from dsv4convert.targets.dequantize import plan_dequantize
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions
from dsv4convert.targets.mend import Mends, plan_mend
from dsv4convert.targets.repack import plan_repack
from dsv4convert.targets.shards import plan_unshard

from ..clusters import (
    INPUT_OUTPUT,
    SLOW_OPTIONS,
    HereCluster,
    close_ray,
    free_port,
    head,
    needs_ray,
    processes,
    wait_for,
)
from ..command_line import run_cli
from .plans import PLANS, contents, interrupt, leftovers

# How many workers are killed, and how often one is.
KILLS, KILL_SECONDS = 4, 0.4

DONE = 0
# Types of which the slow checkpoint takes a processor some seconds.
SLOW = GgufOptions(dense="q4_0", experts="iq4_nl", output="f32")
FAST = ("gguf", "low-bit gguf", "split gguf", "shard", "dequantize", "repack", "mend")
ALL_PLANS: dict[str, Callable[[Path, Path], Plan]] = PLANS | {
    "repack": lambda source, out: plan_repack(source, out / "fp8", max_file_bytes=2_000_000),
    "slow": lambda source, out: plan_gguf(source, out / "model.gguf", SLOW),
    "mend": lambda source, out: plan_mend(source, out / "mended", Mends(drop_draft=True)),
}


# ---- without Ray: what a task holds, and what a worker refuses ---------------------------------------------


@pytest.mark.parametrize("name", FAST)
def test_pieces_of_a_plan_make_its_bytes(name: str, tiny: Path, tmp_path: Path, small_tasks: None) -> None:
    here = HereCluster()
    made = carry_out(name, tiny, tmp_path, "pieces", cluster=here)
    assert len(here.pieces) > 3
    assert made == carry_out(name, tiny, tmp_path, "threads", threads=2)


def test_a_worker_stays_in_a_file_as_long_as_there_are_enough(tiny: Path, tmp_path: Path, small_tasks: None) -> None:
    class InOrder(HereCluster):
        def receive(self, seconds: float) -> Done | None:
            self._tasks.reverse()  # of two
            return super().receive(seconds)

    here = InOrder()
    here.processors = {"one": 1, "other": 1}
    execute(plan_dequantize(tiny, tmp_path / "out", max_file_bytes=800_000), cluster=here)
    nodes: dict[Path, set[str]] = {}
    for piece, node in zip(here.pieces, here.nodes, strict=True):
        nodes.setdefault(piece.path, set()).add(node)
    assert len(nodes) > 3
    assert len(here.pieces) > 2 * len(nodes)
    assert sum(len(found) > 1 for found in nodes.values()) <= 1  # the last one
    assert set().union(*nodes.values()) == {"one", "other"}


def test_pages_that_two_tasks_write_are_written_exactly(
    tiny: Path, tmp_path: Path, small_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, writers = Worker.run, dict[int, set[tuple[int, bool]]]()
    number = 0

    def noted(self: Worker, segment: Any, output: int, path: Path, offset: int) -> Any:
        is_exact = bool(fcntl.fcntl(output, fcntl.F_GETFL) & os.O_DSYNC)
        for page in range(offset // PAGE_BYTES, -(-(offset + segment.nbytes) // PAGE_BYTES)):
            writers.setdefault(page, set()).add((number, is_exact))
        return run(self, segment, output, path, offset)

    def one_more(piece: Piece) -> Any:
        nonlocal number
        number += 1
        return make_piece(piece)

    monkeypatch.setattr(Worker, "run", noted)
    carry_out("gguf", tiny, tmp_path, "pieces", cluster=HereCluster(one_more))
    shared = [found for found in writers.values() if len({number for number, _ in found}) > 1]
    assert shared
    assert all(is_exact for found in shared for _, is_exact in found)
    assert any(not is_exact for found in writers.values() for _, is_exact in found)


@pytest.fixture
def piece(tiny: Path, tmp_path: Path, small_tasks: None) -> tuple[Plan, Piece]:
    """Return a task of a run that was interrupted after a few others."""
    plan = PLANS["gguf"](tiny, tmp_path)
    pieces: list[Piece] = []

    def kept(piece: Piece) -> Any:
        pieces.append(piece)
        if len(pieces) < 3:
            return make_piece(piece)
        raise InputOutputError("cannot be read (a bad block)", where="the test")

    with pytest.raises(InputOutputError):
        execute(plan, cluster=HereCluster(kept))
    return plan, pieces[-1]


@pytest.mark.parametrize("taken", ["resumed", "begun anew", "removed"])
def test_a_worker_of_a_run_that_is_gone_writes_nothing(taken: str, piece: tuple[Plan, Piece]) -> None:
    plan, task = piece
    make_piece(task)  # nobody has taken the output yet
    before = task.path.read_bytes()
    zeros = bytes(len(before))
    task.path.write_bytes(zeros)
    if taken == "removed":
        journal_path(plan).unlink()
    else:
        with Journal(journal_path(plan)) as journal:
            if taken == "resumed":
                journal.resume()
            else:
                journal.begin({}, [], {}, [])
    with pytest.raises(LockedError, match="has taken over"):
        make_piece(task)
    assert task.path.read_bytes() == zeros


def test_another_file_under_the_name_is_left_alone(piece: tuple[Plan, Piece]) -> None:
    _, task = piece
    task.path.rename(task.path.with_name("moved"))
    theirs = bytes(task.nbytes)
    task.path.write_bytes(theirs)
    with pytest.raises(InputOutputError, match="no longer the file"):
        make_piece(task)
    assert task.path.read_bytes() == theirs


def test_a_machine_that_would_make_other_bytes_is_refused(piece: tuple[Plan, Piece], tiny: Path) -> None:
    _, task = piece

    def other(**told: Any) -> Piece:
        return replace(task, work=replace(task.work, **told))

    with pytest.raises(DeviceError, match="another dsv4convert"):
        make_piece(other(program="dsv4convert 0.0.0"))
    with pytest.raises(DeviceError, match="another library of ggml"):
        make_piece(other(libraries={str(tiny / "config.json"): "00"}))
    with pytest.raises(FileFormatError, match="differs on machine"):
        make_piece(other(sources={path: [1, 2] for path in task.work.sources}))
    with pytest.raises(InputOutputError, match="cannot be read"):
        make_piece(other(sources={tiny / "absent": [1, 2]}))


def test_the_processes_of_a_cluster_are_one_thread_of_its_steps(tiny: Path, tmp_path: Path, small_tasks: None) -> None:
    steps: list[Step] = []
    plan = PLANS["gguf"](tiny, tmp_path)
    execute(plan, cluster=HereCluster(), watch=steps.append)
    assert {len(step.threads) for step in steps} == {1}
    assert (steps[0].threads, steps[-1].file) == ((0,), "model.gguf")
    assert steps[-1].threads == (steps[-1].done,)
    assert all(step.waiting is None for step in steps)


def test_the_work_of_a_lost_cluster_is_kept(tiny: Path, tmp_path: Path, small_tasks: None) -> None:
    def lost(piece: Piece) -> Any:
        raise InputOutputError("the Ray cluster was lost", where="ray")

    plan = PLANS["gguf"](tiny, tmp_path)
    with pytest.raises(InputOutputError, match=r"lost.*run again with --resume"):
        execute(plan, cluster=HereCluster(lost))
    execute(plan, resume=True, threads=2)
    assert contents(plan) == carry_out("gguf", tiny, tmp_path, "whole", threads=2)


def test_what_one_machine_began_a_cluster_ends(tiny: Path, tmp_path: Path, small_tasks: None) -> None:
    plan = PLANS["dequantize"](tiny, tmp_path)
    interrupt(plan, 20)
    summary = execute(plan, resume=True, cluster=HereCluster())
    assert summary.resumed_bytes > 0
    assert contents(plan) == carry_out("dequantize", tiny, tmp_path, "whole", threads=2)


@pytest.mark.parametrize("workers", ["", "slurm", "ray:0", "ray:x", "ray://", "ray://host", "tcp://host:1"])
def test_workers_that_are_none(workers: str, tiny: Path, tmp_path: Path) -> None:
    result = run_cli("dequantize", tiny, tmp_path / "out", "--workers", workers)
    assert result.code == 2
    assert "--workers: unknown: expected ray, ray:N, ray:auto or ray://HOST:PORT" in result.error


def test_without_ray_the_error_says_how_to_install_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run_cli("dequantize", tiny, tmp_path / "out", "--workers", "ray")
    assert result.code == 15
    assert result.error == "--workers needs the package ray, which is missing; run pip install 'dsv4convert[ray]'"
    assert list(tmp_path.iterdir()) == []


@needs_ray
def test_ctrl_c_while_ray_ends_does_not_wait_and_leaves_what_is_done_to_be_told() -> None:
    with Cluster("ray:1") as cluster:
        cluster._bridge = bridge = subprocess.Popen(["sleep", "60"])
        threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
    assert bridge.returncode == -signal.SIGKILL


@needs_ray
@pytest.mark.parametrize("named", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}"])
def test_a_cluster_that_does_not_answer_is_waited_for_a_while_and_said_at_once(
    named: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "JOIN_SECONDS", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = named.format(port=silent.getsockname()[1])
        monkeypatch.setenv("RAY_ADDRESS", address)
        begun = time.monotonic()
        result = run_cli("dequantize", tiny, tmp_path / "out", "--workers", "ray:auto")
    assert time.monotonic() - begun < 3 + 5
    assert result.code == 15
    first, second = result.err.splitlines()
    assert first == f"ray:auto ({address}): joining the Ray cluster; waits 3 s at most"
    assert f"ray:auto ({address}): the Ray cluster does not answer: got 3 s of silence; check that it runs" in second
    assert list(tmp_path.iterdir()) == []


@needs_ray
def test_an_address_where_nothing_listens_is_an_error_at_once(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    result = run_cli("dequantize", tiny, tmp_path / "out", "--workers", "ray:auto", "--quiet")
    assert result.code == 15
    assert "the Ray cluster cannot be reached: got [Errno 111] Connection refused" in result.error


@needs_ray
def test_options_that_do_not_go_with_workers(tiny: Path, tmp_path: Path) -> None:
    api.convert_gguf(tiny, tmp_path, max_file_size="1500K")
    part = next(tmp_path.glob("*-00001-of-*.gguf"))
    for command in (
        ("dequantize", tiny, tmp_path / "out", "--threads", 2),
        ("merge", part, tmp_path / "out.gguf", "--delete-parts"),
    ):
        result = run_cli(*command, "--workers", "ray")
        assert result.code == 2
        assert "exclude each other" in result.error


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tasks be small, as the checkpoint is."""
    monkeypatch.setattr(cluster_module, "LEAST_WORK", 2**16)


def carry_out(name: str, source: Path, base: Path, folder: str, **options: Any) -> dict[str, bytes]:
    """Return the files that a plan makes in a folder."""
    out = base / folder
    out.mkdir()
    plan = ALL_PLANS[name](source, out)
    execute(plan, **options)
    assert leftovers(out) == []
    return contents(plan)


@pytest.mark.parametrize(
    ("work", "workers", "of_a_task"),
    [
        (2**34, 4, 2**28),  # 16 tasks for each worker
        (2**40, 256, 2**28),
        (2**40, 1024, 2**28),  # on many workers, no more tasks than for 256
        (2**44, 1024, 2**29),  # unless they would be too large
        (2**20, 4, 2**20),  # or too small
    ],
)
def test_how_much_work_makes_a_task(work: int, workers: int, of_a_task: int) -> None:
    assert work_of_a_task(work, workers) == of_a_task


def test_segments_make_tasks_in_their_order() -> None:
    assert list(cut([3, 1, 4, 1, 5, 9, 2], lambda number: number, 5)) == [[3, 1, 4], [1, 5], [9], [2]]
    assert list(cut([], lambda number: number, 5)) == []


# ---- with Ray --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Give Ray a token of its own, by which all processes of these tests are known."""
    with pytest.MonkeyPatch.context() as patch:
        close_ray(patch)
        yield dict(os.environ)


@pytest.fixture(scope="module")
def two_workers(environment: dict[str, str]) -> Iterator[Cluster]:
    """Return a local cluster of two workers."""
    with Cluster("ray:2") as cluster:
        yield cluster


@needs_ray
@pytest.mark.parametrize("name", FAST)
def test_two_workers_make_the_bytes_of_one_machine(
    name: str, tiny: Path, tmp_path: Path, two_workers: Cluster, small_tasks: None
) -> None:
    made = carry_out(name, tiny, tmp_path, "ray", cluster=two_workers)
    assert made == carry_out(name, tiny, tmp_path, "threads", threads=2)


@needs_ray
def test_a_local_cluster_listens_on_this_machine_alone(two_workers: Cluster, environment: dict[str, str]) -> None:
    two_workers.connect()
    sockets = set()
    for process in processes(environment["RAY_AUTH_TOKEN"], b"ray"):
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(descriptor))
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, address, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                listening.append(address.partition(":")[0])
    assert len(listening) > 3  # the head's, the raylet's, the workers'
    assert {address[-8:] for address in listening} == {"0100007F"}  # 127.0.0.1, plain or mapped into IPv6


@needs_ray
def test_an_error_of_a_worker_is_the_error_of_the_run(tiny: Path, tmp_path: Path, two_workers: Cluster) -> None:
    shards = tmp_path / "shards"
    api.shard(tiny, shards, mp=2)
    second = sorted(shards.glob("*.safetensors"))[1]
    content = bytearray(second.read_bytes())
    header_bytes = int.from_bytes(content[:8], "little")
    begin, _ = json.loads(content[8 : 8 + header_bytes])["norm.weight"]["data_offsets"]
    content[8 + header_bytes + begin] ^= 1
    second.write_bytes(content)
    said = []
    for options in ({"threads": 1}, {"cluster": two_workers}):
        with pytest.raises(Dsv4Error) as caught:
            execute(plan_unshard(shards, tmp_path / "joined"), **options)  # type: ignore[arg-type]
        said.append((type(caught.value), str(caught.value)))
        assert not (tmp_path / "joined.partial").exists()
    assert said[0] == said[1]


@needs_ray
def test_a_worker_killed_again_and_again(
    slow: Path, tmp_path: Path, two_workers: Cluster, environment: dict[str, str]
) -> None:
    killed = 0
    ending = threading.Event()

    def kill() -> None:
        nonlocal killed
        while killed < KILLS and not ending.wait(KILL_SECONDS):
            for process in processes(environment["RAY_AUTH_TOKEN"], b"ray::make_piece")[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
                    killed += 1

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        made = carry_out("slow", slow, tmp_path, "ray", cluster=two_workers)
    finally:
        ending.set()
        killer.join()
    assert killed >= 2
    assert made == carry_out("slow", slow, tmp_path, "threads", threads=2)


def start(source: Path, out: Path, workers: str, *options: str) -> subprocess.Popen[str]:
    """Start the slow conversion in a process of its own."""
    line = [sys.executable, "-m", "dsv4convert", "hf-to-gguf", str(source), str(out), *SLOW_OPTIONS]
    return subprocess.Popen([*line, "--workers", workers, *options], stderr=subprocess.PIPE, text=True)


def is_working(token: str, run: subprocess.Popen[str]) -> bool:
    """Return whether a worker is in the middle of a task."""
    assert run.poll() is None, run.communicate()
    return bool(processes(token, b"ray::make_piece"))


@needs_ray
def test_a_head_that_is_lost_and_started_again(
    slow: Path, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    token = close_ray(monkeypatch)
    out, log = tmp_path / "model.gguf", tmp_path / "head.log"
    try:
        port = head(log)
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        run = start(slow, out, "ray:auto")
        wait_for(partial(is_working, token, run))
        for process in processes(token, b"ray"):
            if process != run.pid:
                os.kill(process, signal.SIGKILL)
        _, said = run.communicate(timeout=120)
        assert run.returncode == INPUT_OUTPUT
        assert "lost" in said
        assert said.endswith("run again with --resume\n")
        assert said.count("\n") == 1
        head(log, port)
        run = start(slow, out, "ray:auto", "--resume")
        assert run.communicate(timeout=120) == (None, "")
    finally:
        for process in processes(token, b"ray"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("model*")} == whole(slow, tmp_path)


@needs_ray
def test_a_driver_that_is_killed_leaves_no_worker(
    slow: Path, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    token = close_ray(monkeypatch)
    out = tmp_path / "model.gguf"
    run = start(slow, out, "ray:2")
    wait_for(partial(is_working, token, run))
    run.kill()
    run.communicate()
    wait_for(lambda: not processes(token, b"ray"))
    run = start(slow, out, "ray:2", "--resume")
    assert run.communicate(timeout=120) == (None, "")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("model*")} == whole(slow, tmp_path)


def whole(source: Path, base: Path) -> dict[str, bytes]:
    """Return what one machine makes of the slow checkpoint."""
    return carry_out("slow", source, base, "whole", threads=2)
