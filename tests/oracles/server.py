"""Programs that take long to start, kept running: a line of JSON in, a line of JSON out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Server:
    """A Python program that calls ``serve``; it starts with the first question, and again after it died of one."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self._process: subprocess.Popen[str] | None = None

    def ask(self, question: Any) -> Any:
        """Return the program's answer; where it dies of the question, the test fails with its last words."""
        if self._process is None:
            self._process = self._start()
        self._before = self._stderr.seek(0, os.SEEK_END)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            code, self._process = self._process.wait(), None
            raise AssertionError(f"the program ended with {code}: {self.said()}")
        return json.loads(answer)

    def said(self) -> str:
        """Return the last of what the program wrote to stderr over the last question."""
        self._stderr.seek(self._before)
        return self._stderr.read().decode(errors="replace")[-2000:]

    def _start(self) -> subprocess.Popen[str]:
        """Start the program. It ends with this process: its input ends then."""
        # For appending: the program shares its position, which reading moves.
        self._stderr = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - as long as the process
        return subprocess.Popen(
            [sys.executable, *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )


def serve(answer: Callable[[Any], Any]) -> None:
    """Answer every question; what the work itself prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()
