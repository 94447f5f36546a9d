"""Whether there is somebody to look at the output, and how wide the window is."""

from __future__ import annotations

import os
import shutil
import sys

# Lines of prose longer than this are hard to read.
MAX_HELP_WIDTH = 100


def is_terminal() -> bool:
    """Return whether stdout is a terminal that can show more than plain text."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def width() -> int:
    """Return the columns of the terminal, or 80."""
    return shutil.get_terminal_size().columns
