"""dsv4convert: DeepSeek-V4 checkpoints to GGUF, model-parallel shards, BF16 and FP8, exactly and in bounded memory."""

from __future__ import annotations

__version__ = "0.1.0"
