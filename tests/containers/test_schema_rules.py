"""The package's own reading of a JSON Schema says what jsonschema says, and leaves other keywords to it."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, validators

from dsv4convert.containers.json_object import schema_path
from dsv4convert.containers.schema_rules import obeys

from ..v41 import published_config

# What config.json may hold by mistake, of every type and near every limit.
VALUES: list[Any] = [None, True, False, 0, 1, -1, 2, 1.0, 0.0, -0.5, 2**24, 2**24 + 1, 2**70, 1e300, 1e301, "", "moe"]
VALUES += [[], {}, [0], [1, "x"], [0, 4, 128, 3], [True], [[1]], {"factor": 0}, {"factor": 16.0, "rope_type": 1}]
VALUES += [["DeepseekV41ForCausalLM"], ["sliding_attention", "other"], {"main": None}, [0] * 1025]


extend: Any = validators.extend
INTEGERS = Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
Validator: Any = extend(Draft202012Validator, type_checker=INTEGERS)


@pytest.mark.parametrize("version", ["v4", "v4.1"])
def test_configs_with_any_value_changed_are_judged_alike(version: str, tiny: Path) -> None:
    schema = json.loads(schema_path("config.schema.json").read_text())
    raw = json.loads((tiny / "config.json").read_text()) if version == "v4" else published_config()["text_config"]
    if version == "v4.1":
        raw["architectures"] = ["DeepseekV41ForCausalLM"]
    validator = Validator(schema)
    verdicts = {True: 0, False: 0}
    for key in [*schema["properties"], "unknown"]:
        for value in [*VALUES, "absent"]:
            document = copy.deepcopy(raw)
            document[key] = value
            if value == "absent":
                del document[key]
            verdict = obeys(document, schema, schema)
            assert verdict == validator.is_valid(document), (key, value)
            verdicts[verdict] += 1
    assert min(verdicts.values()) > 100


def test_values_of_any_shape_are_judged_alike() -> None:
    rng = random.Random(0)
    schema = json.loads(schema_path("config.schema.json").read_text())
    parts = [{**part, "$defs": schema["$defs"]} for part in schema["properties"].values()]
    for _ in range(500):
        part, value = rng.choice(parts), rng.choice(VALUES)
        value = rng.choice(
            [value, [value], [rng.choice(VALUES), value], {"main": value, "compress": {"factor": value}}]
        )
        assert obeys(value, part, part) == Validator(part).is_valid(value), (value, part)


def test_an_unknown_keyword_is_left_to_jsonschema() -> None:
    schema = {"type": "string", "pattern": "a"}
    with pytest.raises(NotImplementedError, match="pattern"):
        obeys("b", schema, schema)


def test_a_right_config_does_not_import_jsonschema(tiny: Path) -> None:
    read = (
        f"from pathlib import Path; from dsv4convert.model.config import load_config; load_config(Path({str(tiny)!r}))"
    )
    code = f"{read}; import sys; sys.exit('jsonschema' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
