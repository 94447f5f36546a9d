"""Entry point of ``python -m dsv4convert`` and of the console script."""

from __future__ import annotations

import contextlib
import os
import sys

from . import cli


def main() -> None:
    """Run the program and leave at once: taking a compiler's libraries apart would take a tenth of a second.

    All files are closed and durable by then; nothing of ours waits for the interpreter's end.
    """
    code: object = 0
    try:
        cli.main()
    except SystemExit as ended:
        code = ended.code
    if code is not None and not isinstance(code, int):
        raise SystemExit(code)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    main()
