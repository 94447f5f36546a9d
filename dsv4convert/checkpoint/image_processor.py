"""Reads how images are normalised before the vision tower sees them, from what processors leave in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..containers.json_object import read_optional_json_object
from ..errors import noted

# Files that say how images are prepared, later ones first asked, and the object of each that may hold it.
PROCESSOR_FILES = (("preprocessor_config.json", "media_proc_cfg"), ("processor_config.json", "image_processor"))

# Mean and standard deviation of red, green and blue.
NORMALISATION_KEYS = ("image_mean", "image_std")
COLOURS = 3

LARGEST = float(np.finfo(np.float32).max)


def read_image_normalisation(source: Path) -> tuple[dict[str, list[float]], tuple[str, ...]]:
    """Return (``image_mean`` and ``image_std``, three numbers each, as far as a processor's file says them, notes).

    A file or a value that cannot be used is noted; the converter's own values then stand.

    Raises:
        InputOutputError: the system refused to read a file that is there.
    """
    found: dict[str, list[float]] = {}
    notes: list[str] = []
    for name, nested in PROCESSOR_FILES:
        settings: dict[str, Any] = {}
        with noted(name, notes):
            settings = read_optional_json_object(source / name)
        inner = settings.get(nested)
        settings |= inner if isinstance(inner, dict) else {}
        for key in NORMALISATION_KEYS:
            value = settings.get(key)
            if isinstance(value, list) and len(value) == COLOURS and all(map(_is_float32, value)):
                found[key] = value
            elif value is not None:
                notes.append(f"{name}: key {key} not used: not a list of {COLOURS} numbers")
    return found, tuple(notes)


def _is_float32(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
