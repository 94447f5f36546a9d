"""Entry point of ``python -m dsv4convert`` and of the console script."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading

from . import cli


class _Ending:
    """What ends the process; the last of Python's exit handlers, since it is the first that is registered.

    Ctrl-C waits for no thread that fetches or sends. Python holds such a thread at its next step in Python, but not
    inside a library's code, and exit(3) tears C libraries down under it: a thread that was opening a connection made
    OpenSSL crash the program after its last line. So where a thread is left, the process ends without exit(3).
    """

    def __init__(self) -> None:
        self.code = 1  # of an exception that Python prints

    def __call__(self) -> None:
        if threading.active_count() == 1:
            return
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(self.code)


def main() -> None:
    """Run the program, and end its process whatever its threads are at."""
    ending = _Ending()
    atexit.register(ending)
    try:
        cli.main()
    except SystemExit as end:
        ending.code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    ending.code = 0


if __name__ == "__main__":
    main()
