"""What can be asked for: each module plans one kind of output, and writes nothing."""

from __future__ import annotations
