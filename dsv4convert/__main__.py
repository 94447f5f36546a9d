"""Entry point of ``python -m dsv4convert`` and of the console script."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading

STOP_LATER_SECONDS = 0.01


class _Ending:
    """What ends the process; the last of Python's exit handlers, since it is the first that is registered.

    Ctrl-C waits for no thread that fetches or sends. Python holds such a thread at its next step in Python, but not
    inside a library's code, and exit(3) tears C libraries down under it: a thread that was opening a connection made
    OpenSSL crash the program after its last line. So where a thread is left, the process ends without exit(3).
    """

    def __init__(self) -> None:
        self.code = 1  # of an exception that Python prints

    def __call__(self) -> None:
        # Python ends by SIGINT, even after SIGTERM, if Ctrl-C has gone through code given to exec() as text, such as
        # that which makes a named tuple, although it was caught since. The next such code makes it forget.
        exec("")
        if threading.active_count() == 1:
            return
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(self.code)


def _stop_later(dropped: sys.UnraisableHookArgs) -> None:
    """Stop the program a bit later where Python drops Ctrl-C, as in the callback of a weak reference."""
    if dropped.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(dropped)
        return
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, STOP_LATER_SECONDS)


def main() -> None:
    """Run the program, and end its process whatever its threads are at."""
    # Python would answer Ctrl-C with a traceback while modules are imported, before anything can say that it was
    # stopped: until then the system ends the process.
    stoppable = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if stoppable:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from . import cli

    if stoppable:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.unraisablehook = _stop_later
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
