"""Strict JSON: one object, no duplicate keys, no NaN, bounded in size; and validation against the schemas."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import ConfigError, Dsv4Error
from .impostors import BYTE_ORDER_MARK, impostor
from .schema_rules import obeys
from .untrusted import read_whole

# An escape that may be half a surrogate pair.
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

# A string, or what people add to JSON: comments, and a comma before a closing bracket.
STRING = rb'"(?:[^"\\]|\\.)*(?:"|\Z)'
COMMENT = re.compile(STRING + rb"|//[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
TRAILING_COMMA = re.compile(STRING + rb"|,(?=\s*[}\]])", re.DOTALL)
NOT_A_LINE_END = re.compile(rb"[^\r\n]")

# A wrong list is wrong in every place; the first errors tell as much as all.
MAX_SCHEMA_ERRORS = 100

# A config is a few KiB; anything near this size is not one, and would only fill memory.
MAX_CONFIG_BYTES = 2**20

FETCH_AGAIN = "fetch the file again"


def schema_path(name: str) -> Path:
    """Return where the JSON Schema ``name`` lies: inside an installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "schemas" / name
    return installed if installed.is_file() else package.parent / "schemas" / name


def validate_schema(document: object, schema: str, where: object) -> None:
    """Check ``document`` against the JSON Schema file ``schema``; the first broken rule is raised.

    Raises:
        ConfigError: a key is missing or has a value that the schema does not allow; the key is named.
    """
    with schema_path(schema).open(encoding="utf-8") as file:
        rules = json.load(file)
    with contextlib.suppress(NotImplementedError, RecursionError):
        if obeys(document, rules, rules):
            return
    from jsonschema import Draft202012Validator, validators

    # JSON Schema counts 160.0 among the integers; a count is no float here.
    extend: Any = validators.extend
    types = Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    validator = extend(Draft202012Validator, type_checker=types)(rules)
    try:
        errors = islice(validator.iter_errors(document), MAX_SCHEMA_ERRORS)
        found = min(errors, key=lambda e: (len(e.absolute_path), e.json_path), default=None)
        if found is None:
            return
        key = found.json_path.removeprefix("$.") or "$"
        message = found.message
    except RecursionError:  # the message shows the value, however deep
        raise ConfigError("JSON nested too deeply", where=where) from None
    message = message if len(message) < 200 else message[:200] + "…"
    raise ConfigError(f"key {key[:200]}: {message}", where=where, hint="correct the file or fetch it again")


def _no_json_number(text: str) -> None:
    """Refuse NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(f"{text} is no number in JSON")


def parse_json(
    text: bytes,
    where: object,
    *,
    error: type[Dsv4Error] = ConfigError,
    subject: str = "",
    hint: str | None = FETCH_AGAIN,
) -> Any:
    """Parse JSON that anyone may have written: UTF-8, no duplicate keys, no NaN, no bottomless nesting.

    ``subject`` names the part of ``where`` that the text is, such as its header.

    Raises:
        ``error``: the text is not such JSON.
    """
    said = f"{subject} is " if subject else ""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise error(f"duplicate key {twice[:200]!r}", where=where, hint=hint)
        return result

    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=_no_json_number)
        if b"\\u" in text and SURROGATE.search(text):
            # Halves of surrogate pairs, which JSON can spell and no file can hold as UTF-8.
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise error("holds half a surrogate pair", where=where) from None
    except RecursionError:
        raise error(f"{subject or 'JSON'} nested too deeply", where=where) from None
    except MemoryError:
        raise error(f"not enough memory for the {subject or 'JSON'}", where=where, got=f"{len(text)} bytes") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as reason:
        what, hint = impostor(text) or (f"not valid JSON ({reason})", hint)
        raise error(f"{said}{what}", where=where, hint=hint) from None
    except ValueError as reason:  # integers of thousands of digits
        raise error(f"{said}not usable JSON ({reason})", where=where) from None
    return document


def parse_json_object(
    text: bytes,
    where: object,
    *,
    error: type[Dsv4Error] = ConfigError,
    subject: str = "",
    hint: str | None = FETCH_AGAIN,
) -> dict[str, Any]:
    """Parse a JSON object, as ``parse_json`` parses any value.

    Raises:
        ``error``: the text is not one JSON object.
    """
    document = parse_json(text, where, error=error, subject=subject, hint=hint)
    return _as_object(document, where, error, subject, hint)


def _as_object(
    document: Any, where: object, error: type[Dsv4Error], subject: str = "", hint: str | None = FETCH_AGAIN
) -> dict[str, Any]:
    if not isinstance(document, dict):
        said = f"{subject} is " if subject else ""
        raise error(f"{said}not a JSON object", where=where, got=type(document).__name__, hint=hint)
    return document


def plain_json(text: bytes) -> bytes:
    """Return JSON without a byte order mark, comments and commas before a closing bracket, each replaced by spaces.

    Positions stay as they are, but for the mark. What stands inside strings is left alone; so is all that is not
    understood, for the parser to name.

    >>> plain_json(b'{"a": [1, 2,], // two' + b"\\n" + b'"b": "//"}')
    b'{"a": [1, 2 ],       \\n"b": "//"}'
    """
    text = text.removeprefix(BYTE_ORDER_MARK)
    return TRAILING_COMMA.sub(_kept, COMMENT.sub(_kept, text))


def _kept(match: re.Match[bytes]) -> bytes:
    """Return a string as it is, and anything else as spaces that keep the lines."""
    found = match[0]
    return found if found.startswith(b'"') else NOT_A_LINE_END.sub(b" ", found)


def parse_plain_json(text: bytes, where: object, *, error: type[Dsv4Error], hint: str | None) -> Any:
    """Parse JSON as ``parse_json``, or as people write it where that fails: marks, comments, trailing commas.

    Raises:
        ``error``: neither reading gives JSON; names the position.
    """
    try:
        return parse_json(text, where, error=error, hint=hint)
    except Dsv4Error:
        plain = plain_json(text)
        if plain == text or impostor(text) is not None:
            raise
        return parse_json(plain, where, error=error, hint=hint)


def read_json(
    path: Path,
    max_bytes: int = MAX_CONFIG_BYTES,
    *,
    error: type[Dsv4Error] = ConfigError,
    hint: str | None = FETCH_AGAIN,
) -> Any:
    """Read JSON of at most ``max_bytes`` from a file that anyone may have written, by hand too (see ``plain_json``).

    Raises:
        InputMissingError, InputOutputError: the file is not there, or cannot be read.
        ``error``: it is too large or not valid JSON.
    """
    return parse_plain_json(read_whole(path, max_bytes, error=error), path, error=error, hint=hint)


def read_json_object(
    path: Path,
    max_bytes: int = MAX_CONFIG_BYTES,
    *,
    error: type[Dsv4Error] = ConfigError,
    hint: str | None = FETCH_AGAIN,
) -> dict[str, Any]:
    """Read a JSON object, as ``read_json`` reads any value.

    Raises:
        InputMissingError, InputOutputError: the file is not there, or cannot be read.
        ``error``: it is too large or not one JSON object.
    """
    return _as_object(read_json(path, max_bytes, error=error, hint=hint), path, error, hint=hint)


def read_optional_json_object(
    path: Path,
    max_bytes: int = MAX_CONFIG_BYTES,
    *,
    error: type[Dsv4Error] = ConfigError,
) -> dict[str, Any]:
    """Return what ``read_json_object`` reads, or an empty object where there is no such file.

    Raises:
        InputMissingError, InputOutputError: the file is there and cannot be read.
        ``error``: it is too large or not one JSON object.
    """
    if not os.path.lexists(path):
        return {}
    return read_json_object(path, max_bytes, error=error)
