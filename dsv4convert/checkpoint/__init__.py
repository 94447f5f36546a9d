"""Reading: what a checkpoint holds and where its bytes lie, from headers alone."""

from __future__ import annotations

from ..containers.safetensors import Stored
from .folder import Checkpoint, Unused, open_folder
from .weights import Encoding, Weight

__all__ = ["Checkpoint", "Encoding", "Stored", "Unused", "Weight", "open_folder"]
