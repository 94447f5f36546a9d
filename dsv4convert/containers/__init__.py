"""File formats, both ways, without a model: safetensors, GGUF, strict JSON, and untrusted files."""

from __future__ import annotations
