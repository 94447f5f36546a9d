"""Whether a JSON value obeys a JSON Schema, for the keywords that the schemas of this package use.

jsonschema knows all of them and can say what is wrong, but importing it takes a sixth of the start of a command. A
value that obeys its schema need not wait for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]

# Keywords that ask for nothing themselves: `if` asks for `then` or `else`, and `$ref` for what is in `$defs`.
SILENT = frozenset({"$schema", "title", "$defs", "then", "else"})


def obeys(value: Any, schema: Schema, root: Schema) -> bool:
    """Return whether ``value`` obeys ``schema``, which is ``root`` or a part of it.

    Raises:
        NotImplementedError: the schema has a keyword that is not known here.
    """
    return all(_obeys_keyword(value, keyword, schema, root) for keyword in schema if keyword not in SILENT)


def _obeys_keyword(value: Any, keyword: str, schema: Schema, root: Schema) -> bool:
    wanted = schema[keyword]
    match keyword:
        case "type":
            return any(_has_type(value, kind) for kind in ([wanted] if isinstance(wanted, str) else wanted))
        case "const":
            return _equals(value, wanted)
        case "enum":
            return any(_equals(value, choice) for choice in wanted)
        case "$ref":
            return obeys(value, root["$defs"][wanted.removeprefix("#/$defs/")], root)
        case "anyOf":
            return any(obeys(value, choice, root) for choice in wanted)
        case "allOf":
            return all(obeys(value, part, root) for part in wanted)
        case "if":
            return obeys(value, schema.get("then" if obeys(value, wanted, root) else "else", {}), root)
        case "minimum":
            return not _has_type(value, "number") or value >= wanted
        case "maximum":
            return not _has_type(value, "number") or value <= wanted
        case "exclusiveMinimum":
            return not _has_type(value, "number") or value > wanted
        case "minItems":
            return not isinstance(value, list) or len(value) >= wanted
        case "maxItems":
            return not isinstance(value, list) or len(value) <= wanted
        case "items":
            return not isinstance(value, list) or all(obeys(item, wanted, root) for item in value)
        case "contains":
            return not isinstance(value, list) or any(obeys(item, wanted, root) for item in value)
        case "required":
            return not isinstance(value, dict) or all(key in value for key in wanted)
        case "properties":
            return not isinstance(value, dict) or all(
                obeys(value[key], wanted[key], root) for key in wanted if key in value
            )
    raise NotImplementedError(keyword)


def _has_type(value: object, name: str) -> bool:
    match name:
        case "object":
            return isinstance(value, dict)
        case "array":
            return isinstance(value, list)
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "number":
            return type(value) in (int, float)
        case "integer":
            return type(value) is int  # as in ``validate_schema``: a count is no float
    raise NotImplementedError(name)


def _equals(value: object, wanted: object) -> bool:
    """Return whether two JSON scalars are equal: 1 is 1.0 and is not true."""
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)
