"""What the fixture that makes checkpoints is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

MakeCheckpoint = Callable[..., Path]
