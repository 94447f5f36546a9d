"""What a checkpoint folder, a GGUF or a set of shards holds, from headers alone."""

from __future__ import annotations
