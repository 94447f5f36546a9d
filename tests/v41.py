"""Where the recorded checkpoints and facts of DeepSeek-V4.1 lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).resolve().parents[1] / "fixtures" / "v41"
TINY = {name: RECORDED / name for name in ("tiny-a", "tiny-b")}


def recorded(name: str) -> Any:
    """Return a recorded JSON document."""
    return json.loads((RECORDED / name).read_text(encoding="utf-8"))


def published_config() -> dict[str, Any]:
    """Return the published config.json."""
    path = RECORDED.parents[1] / "dsv4convert" / "model" / "configs" / "v4.1-flash.json"
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document
