"""JSON that anyone may have written: what is refused, in which words, and that no more is read than allowed."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import dsv4convert
from dsv4convert.containers.json_object import (
    parse_json,
    parse_json_object,
    read_json,
    read_json_object,
    read_optional_json_object,
)
from dsv4convert.containers.untrusted import read_whole
from dsv4convert.errors import ConfigError, Dsv4Error, FileFormatError, InputMissingError, TokenizerError

MALFORMED = [
    pytest.param(b"", "not valid JSON", id="empty"),
    pytest.param(b"{", "not valid JSON", id="cut"),
    pytest.param(b"{} {}", "not valid JSON", id="two"),
    pytest.param(b'"\xff"', "not valid JSON", id="no UTF-8"),
    pytest.param(b"\xef\xbb\xbf{}", "not valid JSON", id="byte order mark"),
    pytest.param(b'{"a": NaN}', "NaN is no number in JSON", id="NaN"),
    pytest.param(b'{"a": -Infinity}', "-Infinity is no number in JSON", id="infinity"),
    pytest.param(b'{"a": ' + b"1" * 5000 + b"}", "not usable JSON", id="digits"),
    pytest.param(b'{"a": {"b": 1, "b": 2}}', "duplicate key 'b'", id="duplicate key"),
    pytest.param(b'{"a": ' * 100_000, "nested too deeply", id="deep"),
    pytest.param(b'{"a": "\\ud800"}', "half a surrogate pair", id="half a pair"),
]

# More than any machine could hold; as a sparse file it takes no room.
ENORMOUS = 2**42


@pytest.mark.parametrize(("text", "message"), MALFORMED)
@pytest.mark.parametrize("error", [ConfigError, FileFormatError, TokenizerError])
def test_malformed_json_is_refused_with_the_callers_error(text: bytes, message: str, error: type[Dsv4Error]) -> None:
    with pytest.raises(error, match=message) as caught:
        parse_json(text, "here", error=error)
    assert str(caught.value).startswith("here: ")


@pytest.mark.parametrize("text", [b"[]", b"null", b"1", b'"a"'])
def test_a_value_is_no_object(text: bytes) -> None:
    parse_json(text, "here")
    with pytest.raises(ConfigError, match="not a JSON object: got "):
        parse_json_object(text, "here")


def test_a_surrogate_pair_is_a_character() -> None:
    assert parse_json(b'{"a": "\\ud83d\\ude00"}', "here") == {"a": "\U0001f600"}


def test_the_part_of_a_file_is_named() -> None:
    with pytest.raises(FileFormatError, match=r"^a\.bin: header is not valid JSON .*; ask again$"):
        parse_json_object(b"{", "a.bin", error=FileFormatError, subject="header", hint="ask again")


@pytest.mark.parametrize("read", [read_json, read_json_object, read_optional_json_object])
def test_a_file_may_be_as_large_as_allowed_and_no_larger(read: object, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"{}".ljust(100))
    assert read(path, 100) == {}  # type: ignore[operator]
    with pytest.raises(FileFormatError, match="too large: expected at most 99 bytes"):
        read(path, 99, error=FileFormatError)  # type: ignore[operator]


def test_an_enormous_file_is_refused_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.touch()
    os.truncate(path, ENORMOUS)
    with pytest.raises(ConfigError, match="too large"):
        read_json(path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_only_a_regular_file_is_read(make: object, tmp_path: Path) -> None:
    make(tmp_path / "a.json")  # type: ignore[operator]
    for read in (read_json, read_optional_json_object):
        with pytest.raises(InputMissingError, match="cannot be read"):
            read(tmp_path / "a.json")
    with pytest.raises(InputMissingError, match="cannot be read"):
        read_whole(tmp_path / "a.json", 1)


def test_only_an_optional_file_may_be_absent(tmp_path: Path) -> None:
    assert read_optional_json_object(tmp_path / "a.json") == {}
    with pytest.raises(InputMissingError, match="no such file"):
        read_json_object(tmp_path / "a.json")


def test_a_link_that_leads_nowhere_is_not_an_absent_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").symlink_to(tmp_path / "gone")
    with pytest.raises(InputMissingError, match="no such file"):
        read_optional_json_object(tmp_path / "a.json")


# Who else parses JSON, and why no one can have tampered with it, or why it is the user's own.
OTHER_PARSERS = {
    "cli/synth.py": "values of --set",
    "containers/json_object.py": "the reader itself",
    "engine/fingerprint.py": "what was encoded on the same line",
    "engine/journal.py": "lines of our own with a checksum",
    "inspection/naming.py": "a config of the package",
    "synth/presets.py": "a config of the package, and what was encoded on the same line",
    "synth/write.py": "the tokenizer that it has just written",
}


def test_no_other_module_parses_json_of_files() -> None:
    package = Path(dsv4convert.__file__).parent
    parsers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"\bjson\.loads?\(", path.read_text(encoding="utf-8"))
    }
    assert parsers == OTHER_PARSERS.keys()
