"""The program as a whole: help, exit codes, quiet and JSON output, dry runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

import dsv4convert
from dsv4convert import __version__, cli
from dsv4convert.cli import parsing
from dsv4convert.cli.help import help_text, panels
from dsv4convert.cli.llama_cpp import LLAMA_CPP_OPTIONS
from dsv4convert.cli.parsing import Command
from dsv4convert.errors import MAX_CHARACTERS, Dsv4Error, escape_control
from dsv4convert.formats.backend import describe_codecs

from ..command_line import run_cli

CONTEXT = cli.app.make_context(cli.PROGRAM, [], resilient_parsing=True)
COMMANDS = cli.app.list_commands(CONTEXT)


def command_of(name: str) -> Command:
    command = cli.app.get_command(CONTEXT, name)
    assert isinstance(command, Command)
    return command


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str) -> None:
    command = command_of(name)
    assert command.help
    assert [parameter.name for parameter in command.params if len(parameter.sentence()) < 5] == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("columns", [80, 100, 120])
@pytest.mark.parametrize("on_a_terminal", [False, True], ids=["plain", "terminal"])
@pytest.mark.parametrize("name", [None, *COMMANDS], ids=str)
def test_help_is_whole_and_fits(
    name: str | None, on_a_terminal: bool, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    command = cli.app if name is None else command_of(name)
    context = CONTEXT if name is None else click.Context(command, parent=CONTEXT, info_name=name)
    text = re.sub("\x1b\\[[0-9;]*m", "", help_text(command, context, rich=on_a_terminal))
    words = "".join(text.split()).replace("│", "")
    for rows in panels(command, context).values():
        for flags, sentence in rows:
            if on_a_terminal:  # the lines of the two columns alternate
                assert all(word in text for word in re.findall(r"[^\s|]+", f"{flags} {sentence}"))
            else:
                assert "".join(f"{flags} {sentence}".split()) in words
    assert "..." not in text.replace("[ARGS]...", "")
    assert "…" not in text
    assert max(map(len, (line for line in text.splitlines() if not line.startswith("Example: ")))) <= columns
    if name is not None:
        last = text[text.index("Example: ") :].removeprefix("Example: ")
        words = shlex.split(last)
        assert words[:2] == [cli.PROGRAM, name]
        command.make_context(name, words[2:], parent=CONTEXT)  # it parses


def test_help_goes_to_a_terminal_in_panels_and_elsewhere_as_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "╭" not in run_cli("shard", "--help").out
    monkeypatch.setattr("dsv4convert.cli.terminal.is_terminal", lambda: True)
    assert "╭─ Content" in run_cli("shard", "--help").out


def test_without_arguments_the_program_prints_its_help() -> None:
    assert run_cli().out == run_cli("--help").out == run_cli("-h").out


def test_the_version_is_told_and_which_codecs_serve() -> None:
    assert run_cli("--version").out == f"dsv4convert {__version__}, {describe_codecs()}\n"


def test_an_unknown_command_is_a_usage_error() -> None:
    result = run_cli("transmogrify")
    assert (result.code, result.error) == (2, "no such command 'transmogrify'; see dsv4convert -h")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["shard", "a", "b"], "option --mp is missing; see dsv4convert shard -h"),
        (["imatrix", "a", "--text", "b"], "option --out / -o is missing; see dsv4convert imatrix -h"),
        (["shard", "a", "--mp", "2"], "argument OUT is missing; see dsv4convert shard -h"),
        (["shard", "a", "b", "--mp", "x"], "invalid value for '--mp': 'x' is not a valid integer; see"),
        (["shard", "a", "b", "--mp", "2", "--draft", "alone"], "invalid value for '--draft': 'alone' is not one of"),
        (["shard", "a", "b", "c", "--mp", "2"], "got unexpected extra argument (c); see dsv4convert shard -h"),
        (["dequantize", "a", "b", "--strikt"], "no such option"),
        (["forward", "a", "--temperature", "nan"], "invalid value for '--temperature': 'nan' is not a number"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_wrong_arguments_are_one_line(arguments: list[str], says: str) -> None:
    result = run_cli(*arguments)
    assert result.code == 2
    assert result.error.startswith(says)


def test_old_names_of_options_are_accepted_and_not_shown() -> None:
    for name in COMMANDS:
        command = command_of(name)
        for option in command.params:
            for alias in getattr(option, "aliases", ()):
                assert not re.search(rf"{alias}\b", run_cli(name, "-h").out)
    shard = command_of("shard")
    values = shard.make_context("shard", ["a", "b", "--mp", "2", "--mtp", "drop", "--expert-dtype", "fp8"]).params
    assert (values["draft"], values["experts"]) == ("drop", "fp8")
    values = command_of("repack").make_context("repack", ["a", "b", "--experts", "fp8", "--require-lossless"]).params
    assert values["strict"] is True
    values = command_of("hf-to-gguf").make_context("hf-to-gguf", ["a", "--split-max-size", "1G"]).params
    assert values["max_file_size"] == "1G"


def test_synth_knows_its_old_options(tmp_path: Path) -> None:
    old = run_cli("synth", tmp_path / "a", "--experts", 4, "--vocab", 400, "--no-mtp", "--json").out
    new = run_cli("synth", tmp_path / "b", "--routed-experts", 4, "--vocab", 400, "--draft", "drop", "--json").out
    assert json.loads(old)["tensors"] == json.loads(new)["tensors"]


@pytest.mark.parametrize("option", sorted(LLAMA_CPP_OPTIONS))
def test_options_of_llama_cpp_are_answered_with_ours(option: str, tmp_path: Path) -> None:
    for arguments in ([tmp_path, option], [option, tmp_path], [tmp_path, f"{option}=1"]):
        result = run_cli("hf-to-gguf", *arguments)
        assert result.code == 2
        assert result.error == f"{option} is an option of convert_hf_to_gguf.py; {LLAMA_CPP_OPTIONS[option]}"


def test_answers_to_options_of_llama_cpp_name_options_that_exist() -> None:
    command = command_of("hf-to-gguf")
    ours = {spelling for parameter in (*command.params, *cli.app.params) for spelling in parameter.opts}
    for option, answer in LLAMA_CPP_OPTIONS.items():
        assert option not in ours
        assert set(re.findall(r"--[a-z-]+", answer)) <= ours


UNUSED_BY_CONVERSIONS = {
    *("rich", "pydantic", "torch", "jsonschema", "concurrent.futures", "http", "socket", "ssl"),
    *("dsv4convert.engine.dry_run", "dsv4convert.engine.upload", "dsv4convert.html_report.report"),
}
UNUSED_BY_FOLDERS = {"ctypes.util", "gguf", "hashlib", "logging", "tempfile", "yaml", "dsv4convert.containers.gguf"}


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], {"rich", "numpy", "jsonschema", "pydantic"}),
        (["hf-to-gguf", "-h"], {"rich", "numpy", "jsonschema", "pydantic"}),
        (["inspect", "{source}"], {"rich", "pydantic", "torch"}),
        (["hf-to-gguf", "{source}", "{out}.gguf", "-q"], UNUSED_BY_CONVERSIONS),
        (["requantize", "{floats}", "{out}", "-q"], {*UNUSED_BY_CONVERSIONS, *UNUSED_BY_FOLDERS}),
        (["repack", "{source}", "{out}", "--experts", "fp8", "-q"], {*UNUSED_BY_CONVERSIONS, *UNUSED_BY_FOLDERS}),
        (["shard", "{source}", "{out}", "--mp", "2", "-q"], {*UNUSED_BY_CONVERSIONS, *UNUSED_BY_FOLDERS}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_commands_load_nothing_that_they_do_not_need(
    arguments: list[str], absent: set[str], tiny: Path, tmp_path: Path
) -> None:
    floats = tmp_path / "floats"
    if "{floats}" in arguments:
        dsv4convert.dequantize(tiny, floats)
    filled = [argument.format(source=tiny, floats=floats, out=tmp_path / "out") for argument in arguments]
    program = (
        "import runpy, sys\n"
        "try:\n    runpy.run_module('dsv4convert', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        f"print('loaded:', *(set({sorted(absent)}) & sys.modules.keys()))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, *filled], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "loaded:"


def complete(words: str, shell: str = "bash") -> list[str]:
    """Return what a shell is told when it completes the last of ``words``."""
    environment = {cli.COMPLETION_VARIABLE: f"{shell}_complete", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(len(words.split(" ")) - 1)
    program = [sys.executable, "-m", "dsv4convert"]
    ended = subprocess.run(program, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return ended.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("dsv4convert hf-", ["plain,hf-to-gguf"]),
        ("dsv4convert shard --exp", ["plain,--experts"]),
        ("dsv4convert shard --draft ", ["plain,keep", "plain,drop", "plain,only", "plain,split"]),
        ("dsv4convert shard ", ["dir,"]),
        ("dsv4convert inspect mod", ["file,mod"]),
        ("dsv4convert shard --mt", []),
    ],
)
def test_shells_complete_commands_options_values_and_paths(words: str, expected: list[str]) -> None:
    assert complete(words) == expected


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_completion_scripts_call_the_program(shell: str) -> None:
    script = run_cli("--show-completion", shell).out
    assert f"{cli.COMPLETION_VARIABLE}={shell}_complete" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n", "/dev/stdin"], input=script, text=True, check=True)


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
    monkeypatch.setenv(parsing.MATRIX_THREADS_VARIABLE, before or "")
    if before is None:
        monkeypatch.delenv(parsing.MATRIX_THREADS_VARIABLE)
    assert run_cli(command, *[tmp_path / "nowhere"] * (2 if command == "compare" else 1)).code == 3
    assert os.environ.get(parsing.MATRIX_THREADS_VARIABLE) == after


@pytest.mark.parametrize("command", sorted(parsing.MULTIPLYING_COMMANDS))
def test_the_commands_that_multiply_are_commands(command: str) -> None:
    assert command in COMMANDS


def test_a_bug_is_one_line_that_asks_for_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bug(arguments: list[str]) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(cli, "run", bug)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == cli.INTERNAL_ERROR_CODE
    assert capsys.readouterr().err == (
        "internal error: ZeroDivisionError: two\\nlines; this is a bug: please report it with the output of --debug\n"
    )


def test_too_little_memory_is_an_error_of_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hungry(arguments: list[str]) -> None:
        raise MemoryError

    monkeypatch.setattr(cli, "run", hungry)
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
