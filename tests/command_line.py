"""Runs the program inside the test's process: its exit code and what it printed, as a shell would see them."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from dataclasses import dataclass
from typing import Any
from unittest import mock

import dsv4convert.cli as cli


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """Return the one line of an error, having made sure that it is one."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        assert lines[0].isprintable()
        return lines[0].removeprefix("error: ")


def run_cli(*arguments: object) -> Result:
    """Run ``dsv4convert`` with ``arguments``; a traceback or an internal error fails the test."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    code: Any = 0
    try:
        with (
            mock.patch.object(sys, "argv", ["dsv4convert", *map(str, arguments)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                cli.main()
            except SystemExit as end:
                code = end.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert "Traceback" not in err.getvalue()
    assert "internal error" not in err.getvalue(), err.getvalue()
    return Result(0 if code is None else int(code), out.getvalue(), err.getvalue())
