"""Reads what a folder says about its model beside the weights: front matter, generation settings, name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..containers.json_object import read_optional_json_object
from ..containers.untrusted import open_regular
from ..errors import FileFormatError

MODEL_CARD_NAME = "README.md"
GENERATION_CONFIG_NAME = "generation_config.json"

# A model card is some KiB of text.
MAX_CARD_BYTES = 2**20

# Keys of the front matter that hold one text, and one that may hold several.
ONE_TEXT = ("name", "model_name", "version", "finetune", "basename")
LICENCE = "license"


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
        InputMissingError: a file is there and cannot be read.
        FileFormatError: the front matter is not usable YAML, or generation_config.json is not a JSON object.
    """
    return ModelCard(
        folder_name=Path(os.path.realpath(folder)).name,
        front_matter=_front_matter(folder),
        generation=read_optional_json_object(
            folder / GENERATION_CONFIG_NAME,
            MAX_CARD_BYTES,
            error=FileFormatError,
            hint="correct or remove the front matter",
        ),
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
            f"front matter is not valid YAML ({reason})", where=path, hint="correct or remove the front matter"
        ) from None
    front_matter = {str(key): value for key, value in card.items()}
    _check(front_matter, path)
    return front_matter


def _check(front_matter: Mapping[str, Any], path: Path) -> None:
    """Refuse what the readers of model cards stumble over.

    Raises:
        FileFormatError: an alias to a list or an object, which may hold itself or a billion others; or a value of
            another type than its key has.
    """
    seen: set[int] = set()
    left: list[object] = [*front_matter.values()]
    while left:
        value = left.pop()
        if not isinstance(value, (list, dict)):
            continue
        if id(value) in seen:
            raise FileFormatError(
                "front matter: alias to a list or an object", where=path, hint="write the value out or remove the key"
            )
        seen.add(id(value))
        left += value.values() if isinstance(value, dict) else value
    for key in ONE_TEXT:
        if isinstance(value := front_matter.get(key), (list, dict)):
            raise FileFormatError(f"front matter: key {key}", where=path, expected="a string", got=value)
    licences = front_matter.get(LICENCE)
    if isinstance(licences, list) and not all(isinstance(item, str) for item in licences):
        raise FileFormatError(
            f"front matter: key {LICENCE}", where=path, expected="a string or a list of strings", got=licences
        )
