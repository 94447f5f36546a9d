"""The program as a whole: help, exit codes, quiet and JSON output, dry runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from dsv4convert import __version__, cli
from dsv4convert.errors import MAX_CHARACTERS, Dsv4Error, escape_control
from dsv4convert.formats.backend import describe_codecs

from ..command_line import run_cli

cli.register_commands()
COMMANDS = sorted(get_command(cli.app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_has_help(command: str) -> None:
    found = get_command(cli.app).commands[command]  # type: ignore[attr-defined]
    assert found.help
    assert [parameter.name for parameter in found.params if not parameter.help] == []
    assert run_cli(command, "--help").code == 0


def test_the_version_is_told_and_which_codecs_serve() -> None:
    assert run_cli("--version").out == f"dsv4convert {__version__}, {describe_codecs()}\n"


def test_an_unknown_command_is_a_usage_error() -> None:
    result = run_cli("transmogrify")
    assert result.code == 2
    assert "transmogrify" in result.err


def test_a_traceback_is_shown_only_with_debug(tmp_path: Path) -> None:
    plain = run_cli("hf-to-gguf", tmp_path / "nowhere", tmp_path / "a.gguf")
    assert (plain.code, len(plain.err.splitlines())) == (3, 1)
    program = [sys.executable, "-m", "dsv4convert", "--debug", "hf-to-gguf", tmp_path / "nowhere"]
    ended = subprocess.run(program, capture_output=True, text=True, check=False, timeout=60)
    assert "Traceback" in ended.stderr


@pytest.mark.parametrize(
    ("command", "before", "after"),
    [
        ("inspect", None, "1"),
        ("hf-to-gguf", None, "1"),
        ("inspect", "3", "3"),
        ("forward", None, None),
        ("compare", None, None),
    ],
)
def test_only_commands_that_multiply_have_numpy_start_threads(
    command: str, before: str | None, after: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cli.MATRIX_THREADS_VARIABLE, before or "")
    if before is None:
        monkeypatch.delenv(cli.MATRIX_THREADS_VARIABLE)
    assert run_cli(command, *[tmp_path / "nowhere"] * (2 if command == "compare" else 1)).code == 3
    assert os.environ.get(cli.MATRIX_THREADS_VARIABLE) == after


@pytest.mark.parametrize("command", sorted(cli.MULTIPLYING_COMMANDS))
def test_the_commands_that_multiply_are_commands(command: str) -> None:
    assert command in COMMANDS


def test_a_bug_is_one_line_that_asks_for_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bug() -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(cli, "register_commands", bug)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == cli.INTERNAL_ERROR_CODE
    assert capsys.readouterr().err == (
        "internal error: ZeroDivisionError: two\\nlines; this is a bug: please report it with the output of --debug\n"
    )


def test_too_little_memory_is_an_error_of_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hungry() -> None:
        raise MemoryError

    monkeypatch.setattr(cli, "register_commands", hungry)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 10
    assert capsys.readouterr().err.startswith("error: not enough memory; ")


def test_quiet_prints_nothing(tiny: Path, tmp_path: Path) -> None:
    result = run_cli("hf-to-gguf", tiny, tmp_path / "a.gguf", "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")


def test_json_is_one_document_that_says_what_was_written(tiny: Path, tmp_path: Path) -> None:
    result = run_cli("hf-to-gguf", tiny, tmp_path / "a.gguf", "--json")
    document = json.loads(result.out)
    assert result.err == ""
    assert document["files"] == [{"path": str(tmp_path / "a.gguf"), "bytes": (tmp_path / "a.gguf").stat().st_size}]
    assert document["resumed_bytes"] == 0
    assert document["dropped"][0]["reason"]


def test_a_dry_run_writes_nothing_and_says_what_it_would(tiny: Path, tmp_path: Path) -> None:
    result = run_cli("hf-to-gguf", tiny, tmp_path / "a.gguf", "--dry-run", "--json")
    document = json.loads(result.out)
    assert list(tmp_path.iterdir()) == []
    assert run_cli("hf-to-gguf", tiny, tmp_path / "a.gguf").code == 0
    assert document["disk_needed"] == (tmp_path / "a.gguf").stat().st_size


def test_a_reader_that_has_enough_is_no_error(tiny: Path) -> None:
    program = f"{sys.executable} -m dsv4convert inspect {tiny} --json | head -c 10"
    ended = subprocess.run(["bash", "-c", f"set -o pipefail; {program}"], capture_output=True, check=False, timeout=60)
    assert ended.stderr == b""


@pytest.mark.parametrize("text", ["\n", "\x1b[31m", "\0", "\u202e", "\x9b", "\ud800", "\u2028"])
def test_control_characters_are_shown_as_escapes(text: str) -> None:
    escaped = escape_control(f"a{text}b")
    assert escaped.isprintable()
    assert escaped.startswith("a\\")


def test_an_error_is_one_line_of_bounded_length() -> None:
    error = Dsv4Error("x" * 10**6, where="here", expected="y" * 10**6, got=[1] * 10**6, hint="do that")
    assert len(str(error)) < 4 * MAX_CHARACTERS
    assert str(error).startswith("here: xxx")
    assert str(error).endswith("; do that")
