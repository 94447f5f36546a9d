"""Reads what a folder says about its model besides the weights: front matter, generation settings, name.

Anyone may have written these files, and no conversion is worth less for them: what cannot be used becomes a note.
Converter and verifier read them here, so that they cannot differ over a card.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..containers.json_object import read_optional_json_object
from ..containers.untrusted import read_whole
from ..errors import FileFormatError, noted

MODEL_CARD_NAME = "README.md"
GENERATION_CONFIG_NAME = "generation_config.json"

# A model card is some KiB of text, and its head a part of that. PyYAML parses about 100 KiB a second, and a head of
# aliases to aliases grows ninefold a line, so that there are limits on size, on depth, on parts, and no aliases.
MAX_CARD_BYTES = 2**20
MAX_HEAD_CHARACTERS = 2**17
MAX_DEPTH = 16
MAX_EVENTS = 20_000
FENCE = "---"

# The folders of the hub's cache: models--OWNER--NAME/snapshots/HASH.
HUB_SNAPSHOT = re.compile(r"/models--(?:[^/]+--)?([^/]+)/snapshots/[0-9a-f]{40}$")

# Keys of the front matter by what they hold; each text also with the prefix ``model_``.
TEXTS = (
    "name", "author", "version", "organization", "description", "finetune", "basename", "size_label", "url", "doi",
    "uuid", "repo_url",
)  # fmt: skip
ONE_TEXT = frozenset(
    {*TEXTS, *(f"model_{name}" for name in TEXTS), "model_creator", "model_type", "license_name", "license_link"}
)
LISTS = frozenset({"tags", "pipeline_tag", "languages", "language", "license"})
ORIGINS = frozenset({"base_model", "base_models", "base_model_sources", "datasets", "dataset", "dataset_sources"})
# The parts of a base model or data set, in the order in which a GGUF has them.
ORIGIN_PARTS = ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")


@dataclass(frozen=True)
class ModelCard:
    """What is known of a model besides its weights; any part may be empty.

    ``front_matter`` is the YAML head of README.md, only with keys that a GGUF has a place for, and values of texts,
    lists of texts, and origins. ``generation`` is generation_config.json, and ``folder_name`` the last part of the
    folder's absolute path (of a snapshot in the hub's cache, the repository's name). ``notes`` say what could not be
    used.
    """

    folder_name: str
    front_matter: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_model_card(folder: Path) -> ModelCard:
    """Read README.md and generation_config.json of ``folder``; neither has to be there, and neither has to be sound.

    Raises:
        InputOutputError: the system refused to read one that is there.
    """
    notes: list[str] = []
    front_matter: dict[str, Any] = {}
    with noted(MODEL_CARD_NAME, notes):
        front_matter = _front_matter(folder / MODEL_CARD_NAME, notes)
    generation: dict[str, Any] = {}
    with noted(GENERATION_CONFIG_NAME, notes):
        generation = read_optional_json_object(folder / GENERATION_CONFIG_NAME, MAX_CARD_BYTES, error=FileFormatError)
    name = _model_name(os.path.realpath(folder)).encode("utf-8", "replace").decode()
    return ModelCard(name or "model", front_matter, generation, tuple(notes))


def _model_name(path: str) -> str:
    """Return a folder's name; of a snapshot in the hub's cache, which is named by a hash, the repository's."""
    match = HUB_SNAPSHOT.search(path)
    return match[1] if match else Path(path).name


def _front_matter(path: Path, notes: list[str]) -> dict[str, Any]:
    """Return the usable part of a card's front matter, and note what is not."""
    if not os.path.lexists(path):
        return {}
    content = read_whole(path, MAX_CARD_BYTES)
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise FileFormatError(f"not valid UTF-8 ({error.reason} at byte {error.start})") from None
    if not lines or lines[0].rstrip() != FENCE:
        return {}
    end = next((number for number, line in enumerate(lines[1:], start=1) if line.rstrip() == FENCE), len(lines))
    head = "\n".join(lines[1:end]).replace("\t", "  ") + "\n"
    if len(head) > MAX_HEAD_CHARACTERS:
        raise FileFormatError(f"front matter of {len(head)} characters, more than {MAX_HEAD_CHARACTERS}")
    document = _load(head)
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise FileFormatError("front matter is no object")
    found: dict[str, Any] = {}
    dropped: list[str] = []
    for key, value in document.items():
        if not isinstance(key, str) or value is None or key not in ONE_TEXT | LISTS | ORIGINS:
            continue
        usable = _usable(key, value)
        if usable is None:
            dropped.append(key)
        else:
            found[key] = usable
    if dropped:
        notes.append(f"{MODEL_CARD_NAME}: keys not used, whose values have no usable form: {', '.join(dropped)}")
    return found


def _load(head: str) -> Any:
    """Parse YAML that anyone may have written: no tags of Python, no aliases, bounded in depth and parts.

    Raises:
        FileFormatError: it is not such YAML.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        depth = 0
        for number, event in enumerate(yaml.parse(head, Loader=yaml.SafeLoader)):
            if isinstance(event, yaml.AliasEvent):
                raise FileFormatError("front matter has an alias, write the value out")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH or number > MAX_EVENTS:
                raise FileFormatError("front matter is nested too deeply or has too many parts")
        return yaml.safe_load(head)
    except FileFormatError:
        raise
    except Exception as error:  # noqa: BLE001 - its constructors raise whatever int(), date() and base64 raise
        raise FileFormatError(f"front matter is not valid YAML ({error})") from None


def _usable(key: str, value: object) -> Any:
    """Return a value in the form that its key wants, None where it has no such form."""
    if key in ORIGINS:
        items = value if isinstance(value, list) else [value]
        origins = [origin for item in items if (origin := _origin(item)) is not None]
        return origins if len(origins) == len(items) else None
    if key in LISTS and isinstance(value, list):
        texts = [_text(item) for item in value]
        return None if None in texts else texts
    return _text(value)


def _origin(value: object) -> str | dict[str, str] | None:
    """Return a base model or data set: its name, or an object with the parts that there are keys for."""
    if isinstance(value, dict):
        parts = {key: value[key] for key in ORIGIN_PARTS if value.get(key) is not None}
        texts = {key: text for key, part in parts.items() if (text := _text(part)) is not None}
        return texts if len(texts) == len(parts) else None
    text = _text(value) if isinstance(value, str) else None
    if text is None:
        return None
    from gguf import Metadata

    try:
        # The convention that takes names apart is written for names of the usual form.
        Metadata.get_model_id_components(text)
        Metadata.get_model_id_components(text, 10**9)
    except (IndexError, ValueError):
        return None
    return text


def _text(value: object) -> str | None:
    """Return YAML's scalar as a text: ``version: 4`` means "4"; None for what is none, or cannot be written as UTF-8.

    YAML 1.1 reads the language code of Norwegian as False.
    """
    if value is None or isinstance(value, (list, dict, set, bytes, tuple)):
        return None
    try:
        text = "no" if value is False else value if isinstance(value, str) else str(value)
        text.encode()
    except ValueError:  # half a surrogate pair, or an integer of thousands of digits
        return None
    return text
