"""What a DeepSeek model is: its config, its tensors by name and shape, and how ranks share them."""

from __future__ import annotations
