"""Recipes: which element type each tensor of a GGUF gets, as data. A recipe is a TOML file:

    description = "one line"
    dense = "q8_0"           # attention and shared experts
    experts = "q2_k"         # routed experts
    output = "q6_k"          # output.weight
    embedding = "q8_0"       # token_embd.weight
    dialect = "ds4"          # optional: the only dialect that the recipe is listed for

    [[tensor]]               # later rows win
    match = "ffn_down_exps"  # a regular expression, found anywhere in the GGUF name
    type = "mxfp4"
    layers = "0-5"           # optional: a range, "first 1/8" or "last 1/8"; several with commas

Keys that are left out leave the default. Norms, biases, sinks, the router and the matrices of the hyper-connections
keep their precision unless a row names them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ...containers.toml_files import names_in, parse_toml, read_named
from ...errors import FileFormatError, UsageError
from ...formats.ggml_types import BY_NAME

MAX_RECIPE_BYTES = 2**20
TYPE_KEYS = ("dense", "experts", "output", "embedding")
_SHARE = re.compile(r"(first|last) ([1-9][0-9]?)/([1-9][0-9]?)")
_RANGE = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")


@dataclass(frozen=True)
class Rule:
    """One row: tensors whose GGUF name holds ``pattern``, in ``layers`` (all where None), get ``type``."""

    pattern: re.Pattern[str]
    type: str
    layers: str | None = None

    def holds(self, name: str, layer: int | None, n_layers: int) -> bool:
        """Return whether the row is about the tensor ``name`` of ``layer`` (None outside the blocks)."""
        if self.pattern.search(name) is None:
            return False
        if self.layers is None:
            return True
        return layer is not None and any(_in_layers(part.strip(), layer, n_layers) for part in self.layers.split(","))


@dataclass(frozen=True)
class Recipe:
    """A recipe: types by kind of tensor (None: the default), and rows that name tensors, the last one winning.

    ``dialect`` is the one that the recipe is for, None for all.
    """

    name: str
    description: str = ""
    dense: str | None = None
    experts: str | None = None
    output: str | None = None
    embedding: str | None = None
    dialect: str | None = None
    rules: tuple[Rule, ...] = ()


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return names_in(__package__)


def load_recipe(name: str) -> Recipe:
    """Return the recipe called ``name``, or the one in the file of that path (a name that ends in ``.toml``).

    Raises:
        UsageError: no such recipe.
        InputMissingError: no such file.
        FileFormatError: malformed; the key is named.
    """
    return parse_recipe(*read_named("--recipe", name, __package__, MAX_RECIPE_BYTES))


def parse_recipe(name: str, content: bytes, where: object) -> Recipe:
    """Return the recipe that a TOML text describes.

    Raises:
        FileFormatError: malformed; the key is named.
    """
    table = parse_toml(content, where)
    description = _text(table.pop("description", ""), "description", where)
    dialect = _text(table.pop("dialect"), "key dialect", where) if "dialect" in table else None
    types = {key: known_type(table.pop(key), f"key {key}", where) for key in TYPE_KEYS if key in table}
    rows = table.pop("tensor", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise FileFormatError("key tensor: not a list of tables", where=where, expected="[[tensor]]")
    for key in table:
        raise FileFormatError(
            f"unknown key {key!r}", where=where, expected=f"description, dialect, {', '.join(TYPE_KEYS)} or tensor"
        )
    rules = tuple(_rule(row, n, where) for n, row in enumerate(rows))
    return Recipe(name, description, **types, dialect=dialect, rules=rules)


def _rule(row: Mapping[str, Any], number: int, where: object) -> Rule:
    what = f"tensor row {number + 1}"
    for key in row.keys() - {"match", "type", "layers"}:
        raise FileFormatError(f"{what}: unknown key {key!r}", where=where, expected="match, type or layers")
    for key in ("match", "type"):
        if key not in row:
            raise FileFormatError(f"{what}: key {key} is missing", where=where)
    layers = row.get("layers")
    if layers is not None:
        for part in _text(layers, f"{what}: layers", where).split(","):
            if not (_SHARE.fullmatch(part.strip()) or _RANGE.fullmatch(part.strip())):
                raise FileFormatError(
                    f"{what}: layers", where=where, expected='such as "0-5", "first 1/8" or "last 1/8"', got=part
                )
    pattern = compile_pattern(_text(row["match"], f"{what}: match", where), f"{what}: match", where)
    return Rule(pattern, known_type(row["type"], what, where), layers)


def tensor_type_rules(options: Iterable[str]) -> tuple[Rule, ...]:
    """Return the rows of ``--tensor-type REGEX=TYPE`` options, in their order.

    Raises:
        UsageError: malformed.
    """
    rules: list[Rule] = []
    for option in options:
        pattern, equals, name = option.rpartition("=")
        if not (pattern and equals):
            raise UsageError("--tensor-type", expected="REGEX=TYPE, e.g. ffn_down_exps=q4_k", got=option)
        try:
            rules.append(Rule(compile_pattern(pattern, "--tensor-type", None), known_type(name, "--tensor-type", None)))
        except FileFormatError as error:
            raise UsageError(error.what, expected=error.expected, got=error.got) from None
    return tuple(rules)


def compile_pattern(pattern: str, what: str, where: object) -> re.Pattern[str]:
    """Return a compiled regular expression.

    Raises:
        FileFormatError: it is none.
    """
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise FileFormatError(f"{what}: not a regular expression ({error})", where=where, got=pattern) from None


def known_type(value: object, what: str, where: object) -> str:
    """Return the name of an element type in lower case.

    Raises:
        FileFormatError: unknown.
    """
    name = _text(value, what, where).lower()
    if name not in OUTPUT_TYPES:
        raise FileFormatError(f"{what}: unknown type", where=where, expected=", ".join(OUTPUT_TYPES), got=value)
    return name


# All that a tensor can be asked to become. Q8_1 and Q8_K are for intermediate results only.
OUTPUT_TYPES = tuple(name for name in BY_NAME if name not in ("q8_1", "q8_k", "i8", "i16", "i32", "i64", "f64"))


def _text(value: object, what: str, where: object) -> str:
    if not isinstance(value, str):
        raise FileFormatError(f"{what}: not a text", where=where, got=value)
    return value


def _in_layers(part: str, layer: int, n_layers: int) -> bool:
    share = _SHARE.fullmatch(part)
    if share is not None:
        count = int(n_layers * Fraction(int(share[2]), int(share[3])))
        return layer < count if share[1] == "first" else layer >= n_layers - count
    found = _RANGE.fullmatch(part)
    if found is None:
        return False
    return int(found[1]) <= layer <= int(found[2] or found[1])
