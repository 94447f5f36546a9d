"""Runs the program as a process of its own that has a local hub for the hub, by the hub's own variables."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..command_line import Result
from .hub_server import Hub

# The program with waits short enough for tests.
PROGRAM = """
from dsv4convert.containers import fetching
fetching.FIRST_WAIT_SECONDS, fetching.LONGEST_WAIT_SECONDS = 0.01, 0.1
from dsv4convert.__main__ import main
main()
"""
REPOSITORY = "somebody/Small-V4"
WAIT_SECONDS = 60


def heed_ctrl_c() -> None:
    """Undo what a shell does to a background job: its children ignore the signal."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass
class Remote:
    """A hub with a repository, and an empty cache of the hub's."""

    hub: Hub
    home: Path
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """Start ``dsv4convert`` with arguments."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": self.hub.endpoint, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, arguments)],
            env=environment | self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=heed_ctrl_c,
        )

    def run(self, *arguments: object) -> Result:
        """Run ``dsv4convert`` with arguments, which ends with a result or one line of error."""
        return finished(self.start(*arguments))

    def interrupted(self, *arguments: object, folder: Path) -> Result:
        """Run ``dsv4convert`` and press Ctrl-C when it is writing to ``folder``."""
        with self.held_at_work(folder):
            process = self.start(*arguments)
            self.wait_for_work()
            process.send_signal(signal.SIGINT)
            return finished(process)  # without a byte more

    @contextlib.contextmanager
    def held_at_work(self, folder: Path) -> Iterator[None]:
        """Hold the hub's answers inside, once an output is being made in ``folder`` and two more have been given."""
        begun: list[int] = []

        def holds() -> bool:
            if not begun and list(folder.glob("*partial*")):
                begun.append(len(self.hub.requests))
            return bool(begun) and len(self.hub.requests) >= begun[0] + 2

        self.hub.faults.holds = holds
        try:
            yield
        finally:
            self.hub.faults.holds = lambda: False

    def wait_for_work(self) -> None:
        """Wait until the hub holds its answers."""
        end = time.monotonic() + WAIT_SECONDS
        while not self.hub.faults.holds():
            assert time.monotonic() < end, "nothing was asked for"
            time.sleep(0.01)


def finished(process: subprocess.Popen[str]) -> Result:
    """Wait for the program's end."""
    out, err = process.communicate(timeout=WAIT_SECONDS)
    assert "Traceback" not in err, err
    assert "internal error" not in err, err
    return Result(process.returncode, out, err)


def contents(path: Path) -> dict[str, bytes]:
    """Return the files of an output by name, without the manifest."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {"" if file == path else str(file.relative_to(path)): file.read_bytes() for file in files}
