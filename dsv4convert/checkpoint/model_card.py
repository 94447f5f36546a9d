"""Reads what a folder says about its model beside the weights: front matter, generation settings, name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..containers.json_object import no_json_number
from ..containers.untrusted import open_regular, read_at_most
from ..errors import FileFormatError

MODEL_CARD_NAME = "README.md"
GENERATION_CONFIG_NAME = "generation_config.json"

# A model card is some KiB of text.
MAX_CARD_BYTES = 2**20


@dataclass(frozen=True)
class ModelCard:
    """What is known of a model beside its weights; any part may be empty.

    ``front_matter`` is the YAML head of README.md, ``generation`` is generation_config.json, and
    ``folder_name`` is the last part of the folder's absolute path.
    """

    folder_name: str
    front_matter: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)


def read_model_card(folder: Path) -> ModelCard:
    """Read README.md and generation_config.json of ``folder``; neither has to be there.

    Raises:
        FileFormatError: the front matter is not YAML, or generation_config.json is not a JSON object.
    """
    return ModelCard(
        folder_name=folder.resolve().name,
        front_matter=_front_matter(folder),
        generation=_generation(folder / GENERATION_CONFIG_NAME),
    )


def _front_matter(folder: Path) -> dict[str, Any]:
    path = folder / MODEL_CARD_NAME
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > MAX_CARD_BYTES:
            raise FileFormatError("too large", where=path, expected=f"at most {MAX_CARD_BYTES} bytes")
        with open_regular(path) as file:
            if file.readline().strip() != b"---":
                return {}  # no front matter: the YAML reader is not even loaded
    except OSError as error:
        raise FileFormatError(f"cannot be read ({error.strerror})", where=path) from None
    import yaml  # type: ignore[import-untyped]
    from gguf import Metadata

    try:
        card = Metadata.load_model_card(folder)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FileFormatError(
            f"front matter is not valid YAML ({reason})", where=path, hint="correct it or take it out"
        ) from None
    return {str(key): value for key, value in card.items()}


def _generation(path: Path) -> dict[str, Any]:
    try:
        text = read_at_most(path, MAX_CARD_BYTES)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise FileFormatError(f"cannot be read ({error.strerror})", where=path) from None
    try:
        document = json.loads(text, parse_constant=no_json_number)
    except (ValueError, RecursionError, MemoryError) as error:
        raise FileFormatError(f"not valid JSON ({error})", where=path, hint="correct it or take it out") from None
    if not isinstance(document, dict):
        raise FileFormatError("not a JSON object", where=path, got=type(document).__name__)
    return document
