"""Figures as people read them."""

from __future__ import annotations


def human_bytes(size: float) -> str:
    """Return a size in decimal units, three significant digits.

    >>> human_bytes(159609485896)
    '160 GB'
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:#.3g} {unit}"
        size /= 1000
    return ""


def human_seconds(seconds: float) -> str:
    """Return a duration as people read it.

    >>> human_seconds(3725)
    '1 h 02 min'
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds) // 60
    return f"{minutes} min {int(seconds) % 60:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def short_seconds(seconds: float) -> str:
    """Return a duration as people read it, in milliseconds below a second."""
    return human_seconds(seconds) if seconds >= 1 else f"{seconds * 1000:.3g} ms"
