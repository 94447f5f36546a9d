"""Entry point of ``python -m dsv4convert`` and of the console script."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import sys

STOP_LATER_SECONDS = 0.01

# Objects made between two searches for unreachable cycles. Modules and plans are made of objects that live to the end,
# and with the default of 700 a command spends a tenth of its start on searching them in vain.
GC_THRESHOLD = (1_000_000, 20, 20)


class _Ending:
    """What ends the process; the last of Python's exit handlers, since it is the first that is registered.

    Python would take all objects apart first, which is most of the end of a short command, and exit(3) the C libraries.
    Ctrl-C waits for no thread that fetches or sends. Python holds such a thread at its next step in Python, but not
    inside a library's code: a thread that was opening a connection made OpenSSL crash the program after its last line.
    """

    def __init__(self) -> None:
        self.code = 1  # of an exception that Python prints

    def __call__(self) -> None:
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
    gc.set_threshold(*GC_THRESHOLD)
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
