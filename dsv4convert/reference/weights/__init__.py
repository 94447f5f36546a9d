"""Weights of the reference forward, from a folder, shards or a GGUF."""

from __future__ import annotations
