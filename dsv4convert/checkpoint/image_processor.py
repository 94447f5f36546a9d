"""Reads how images are normalised before the vision tower sees them, from what processors leave in a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..containers.json_object import read_optional_json_object
from ..errors import ConfigError

# Files that say how images are prepared, later ones first asked, and the object of each that may hold it.
PROCESSOR_FILES = (("preprocessor_config.json", "media_proc_cfg"), ("processor_config.json", "image_processor"))

# Mean and standard deviation of red, green and blue.
NORMALISATION_KEYS = ("image_mean", "image_std")
COLOURS = 3

LARGEST = float(np.finfo(np.float32).max)


def read_image_normalisation(source: Path) -> dict[str, list[float]]:
    """Return ``image_mean`` and ``image_std``, three numbers each, as far as a processor's file says them.

    Raises:
        InputMissingError: such a file is there and cannot be read.
        ConfigError: it is malformed.
    """
    found: dict[str, list[float]] = {}
    for name, nested in PROCESSOR_FILES:
        path = source / name
        settings = read_optional_json_object(path)
        inner = settings.get(nested)
        settings |= inner if isinstance(inner, dict) else {}
        for key in NORMALISATION_KEYS:
            value = settings.get(key)
            if value is None:
                continue
            if not isinstance(value, list) or len(value) != COLOURS or not all(map(_is_float32, value)):
                raise ConfigError(f"key {key}", where=path, expected=f"a list of {COLOURS} numbers", got=value)
            found[key] = value
    return found


def _is_float32(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST  # type: ignore[arg-type]
