"""Strict JSON: one object, no duplicate keys, no NaN, bounded in size; and validation against the schemas."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import ConfigError, InputMissingError
from .untrusted import read_at_most

# An escape that may be half a surrogate pair.
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

# A wrong list is wrong in every place; the first errors tell as much as all.
MAX_SCHEMA_ERRORS = 100

# A config is a few KiB; anything near this size is not one, and would only fill memory.
MAX_CONFIG_BYTES = 2**20


def schema_path(name: str) -> Path:
    """Return where the JSON Schema ``name`` lies: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "schemas" / name
    return installed if installed.is_file() else package.parent / "schemas" / name


def validate_schema(document: object, schema: str, where: object, error: type[ConfigError] = ConfigError) -> None:
    """Check ``document`` against the JSON Schema file ``schema``; the first broken rule is raised.

    Raises:
        ConfigError: a key is missing or has a value that the schema does not allow; the key is named.
    """
    from jsonschema import Draft202012Validator

    with schema_path(schema).open(encoding="utf-8") as file:
        validator = Draft202012Validator(json.load(file))
    try:
        errors = islice(validator.iter_errors(document), MAX_SCHEMA_ERRORS)
        found = min(errors, key=lambda e: (len(e.absolute_path), e.json_path), default=None)
        if found is None:
            return
        key = found.json_path.removeprefix("$.") or "$"
        message = found.message
    except RecursionError:  # the message shows the value, however deep
        raise error("JSON nested too deeply", where=where) from None
    message = message if len(message) < 200 else message[:200] + "…"
    raise error(f"key {key[:200]}: {message}", where=where, hint="correct the file or fetch it again")


def no_json_number(text: str) -> None:
    """Refuse NaN and Infinity, which Python reads and JSON does not have; for ``parse_constant``."""
    raise ValueError(f"{text} is no number in JSON")


def parse_json_object(text: bytes, where: object) -> dict[str, Any]:
    """Parse a JSON object, refusing duplicate keys, deep nesting and anything that is no object.

    Raises:
        ConfigError: the text is not one JSON object.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise ConfigError(f"key {twice[:200]!r} is there twice", where=where)
        return result

    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=no_json_number)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"not valid JSON ({error})", where=where, hint="fetch the file again") from None
    except RecursionError:
        raise ConfigError("JSON nested too deeply", where=where) from None
    except MemoryError:
        raise ConfigError("not enough memory for it", where=where, got=f"{len(text)} bytes") from None
    except ValueError as error:  # integers of thousands of digits
        raise ConfigError(f"not usable JSON ({error})", where=where) from None
    if not isinstance(document, dict):
        raise ConfigError("not a JSON object", where=where, got=type(document).__name__)
    if SURROGATE.search(text):
        _check_encodable(document, where)
    return document


def _check_encodable(document: object, where: object) -> None:
    """Refuse halves of surrogate pairs, which JSON can spell and no file can hold as UTF-8."""
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ConfigError("holds half a surrogate pair", where=where) from None
    except RecursionError:
        raise ConfigError("JSON nested too deeply", where=where) from None


def read_json_object(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON object of at most ``max_bytes`` from ``path``.

    Raises:
        InputMissingError: the file cannot be read.
        ConfigError: it is too large or not one JSON object.
    """
    try:
        text = read_at_most(path, max_bytes)
    except FileNotFoundError:
        raise InputMissingError("no such file", where=path, hint="is the download complete?") from None
    except OSError as error:
        raise InputMissingError(f"cannot be read ({error.strerror})", where=path) from None
    if len(text) > max_bytes:
        raise ConfigError("too large", where=path, expected=f"at most {max_bytes} bytes")
    return parse_json_object(text, path)
