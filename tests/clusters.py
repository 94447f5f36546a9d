"""Clusters for tests: one within this process, and what starts, watches and closes a real one of Ray."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4convert.engine.cluster import Cluster
from dsv4convert.engine.cluster_bridge import MAKE, Done, Submit
from dsv4convert.engine.cluster_worker import FinalError
from dsv4convert.errors import Dsv4Error

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")

# The exit code of a run that may go on.
INPUT_OUTPUT = 16
# Types of which the slow checkpoint takes a processor some seconds.
SLOW_OPTIONS = ("--dense", "q4_0", "--experts", "iq4_nl", "--output-type", "f32", "--quiet")


class HereCluster(Cluster):
    """In place of a cluster: tasks are made in this process, when their results are asked for."""

    def __init__(self, make: Callable[[Any], Any] = lambda piece: MAKE[type(piece)](piece)) -> None:
        self.workers, self.note = "here", None
        self.processors = {"one": 1, "other": 2}
        self.pieces: list[Any] = []
        self.nodes: list[str] = []
        self.numbers = itertools.count()
        self._tasks: list[Submit] = []
        self._make = make

    def connect(self) -> None:
        """Do nothing."""

    def send(self, task: Submit) -> None:
        """Keep a task."""
        self._tasks.append(task)
        self.pieces.append(task.piece)
        self.nodes.append(task.node)

    def receive(self, seconds: float) -> Done | None:
        """Carry out the task that came last."""
        task = self._tasks.pop()
        try:
            return Done(task.number, self._make(task.piece))
        except FinalError as error:
            return Done(task.number, error.args[0])
        except Dsv4Error as error:
            return Done(task.number, error)


def close_ray(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a new token, which Ray asks of everyone from now on, and by which its processes are known."""
    token = secrets.token_hex(16)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    return token


def processes(token: str, name: bytes) -> list[int]:
    """Return the processes of a Ray cluster, by its token, whose command line has ``name`` in it."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            is_named = entry.name.isdecimal() and name in (entry / "cmdline").read_bytes()
            if is_named and token.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def wait_for(found: Callable[[], object], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def head(log: Path, port: int | None = None) -> int:
    """Start the head of a cluster with two processors; return its port, which is a free one unless it is given.

    Ray ends at once when a port is taken meanwhile, or is one that it has for something else: others are tried then.
    """
    for _ in range(5):
        chosen = port or free_port()
        line = ["start", "--head", "--block", "--num-cpus=2", f"--port={chosen}", "--include-dashboard=false"]
        line += ["--node-ip-address=127.0.0.1", f"--ray-client-server-port={free_port()}"]
        line += ["--object-store-memory=80000000", "--disable-usage-stats"]
        with log.open("ab") as said:
            process = subprocess.Popen([sys.executable, "-m", "ray.scripts.scripts", *line], stdout=said, stderr=said)
        wait_for(lambda: process.poll() is not None or answers(chosen))  # noqa: B023 - called in its round
        if process.poll() is None:
            return chosen
    raise AssertionError(log.read_text())
