"""The documentation says what the program does: reference, links, no stray paths."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main

from dsv4convert.cli import app, register_commands

from .command_line import run_cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_command_line_reference_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_cli_reference.py"))["reference"]()
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == made, "run docs/make_cli_reference.py"


class Parameter(NamedTuple):
    """What a user is told of an argument or an option."""

    names: frozenset[str]
    value: str  # choices, the placeholder of another value, or nothing for a flag
    help: str
    default: str
    bounds: str
    required: bool


# The page is made from the functions behind the commands. Here it is held against what --help prints, which is made
# from the parser, so that a fault in reading the one does not hide in the other.

BEFORE = "before the command"
FLAG = re.compile(r"(?<![\w.])--?[a-z][a-z0-9-]*")
EXTRAS = re.compile(r"  \[([^\[\]]*)\]$")
CHOICES = re.compile(r"[<\[]([\w.-]+(?:\|[\w.-]+)*)[>\]]$")
TYPES = {"path", "str", "int", "float"}
BOUNDS = {
    "From {} to {}": re.compile(r"(\S+)<=x<=(\S+)"),
    "At least {}": re.compile(r"x>=(\S+)"),
    "At most {}": re.compile(r"x<=(\S+)"),
}


def told_by_the_program() -> dict[str, list[Parameter]]:
    register_commands()
    group: Any = typer.main.get_command(app)
    context = group.make_context("dsv4convert", [], resilient_parsing=True)
    told = {BEFORE: _told(group, context)}
    for name, command in group.commands.items():
        if not command.hidden:
            told[name] = _told(command, command.make_context(name, [], parent=context, resilient_parsing=True))
    return told


def _told(command: Any, context: Any) -> list[Parameter]:
    records = [(parameter, parameter.get_help_record(context)) for parameter in command.get_params(context)]
    return [_parameter(parameter, *record) for parameter, record in records if record and "--help" not in record[0]]


def _parameter(parameter: Any, name: str, text: str) -> Parameter:
    found = EXTRAS.search(text)
    extras = found[1].split("; ") if found else []
    default = [extra.removeprefix("default: ") for extra in extras if extra.startswith("default: ")]
    bounds = [
        words.format(*numbers.groups())
        for extra in extras
        for words, pattern in BOUNDS.items()
        if (numbers := pattern.fullmatch(extra))
    ]
    choices = CHOICES.search(name)
    names = frozenset(FLAG.findall(name.split("<")[0]))
    value = ""
    if not names:
        names = frozenset([str(parameter.metavar or parameter.name.upper())])
    elif choices and choices[1] not in TYPES:
        value = choices[1]
    elif not parameter.is_flag:
        value = str(parameter.metavar or "VALUE")
    sentence = EXTRAS.sub("", text).removesuffix(".")
    return Parameter(names, value, sentence, "".join(default), "".join(bounds), "required" in extras)


LINE = re.compile(
    r"- `(?P<names>[^ ,`]+(?:, [^ ,`]+)*)(?: (?P<value>[^`]+))?`: (?P<help>.*?)\."
    r"(?: Default: (?P<default>\S+)\.)?(?: (?P<bounds>(?:From|At least|At most) [^ ]+(?: to \S+)?)\.)?"
)


def told_by_the_page() -> dict[str, list[Parameter]]:
    told: dict[str, list[Parameter]] = {BEFORE: []}
    command, usage = BEFORE, ""
    for line in (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            command = line.removeprefix("## ")
        elif line.startswith("    dsv4convert "):
            usage = line
            told[command] = []
        elif line.startswith("- `"):
            found = LINE.fullmatch(line)
            assert found, line
            names = frozenset(FLAG.findall(found["names"]) or [found["names"].strip("[]")])
            required = f" {found['names']}" in usage and not found["names"].startswith("[")
            told[command].append(
                Parameter(
                    names, found["value"] or "", found["help"], found["default"] or "", found["bounds"] or "", required
                )
            )
    return told


def test_the_page_says_of_every_command_and_option_what_the_program_says() -> None:
    program, page = told_by_the_program(), told_by_the_page()
    assert list(page) == list(program)
    for command, parameters in program.items():
        assert [p.names for p in page[command]] == [p.names for p in parameters], command
        assert page[command] == parameters, command


def test_what_the_program_says_is_what_it_prints() -> None:
    for command, parameters in told_by_the_program().items():
        printed = run_cli(*([] if command == BEFORE else [command]), "--help").out
        first_columns = re.findall(r"^  (-.*?)(?:  |$)", printed, re.MULTILINE)
        flags = {flag for column in first_columns for flag in FLAG.findall(column)}
        assert {name for p in parameters for name in p.names if name.startswith("-")} == flags - {"-h", "--help"}


def test_every_command_and_option_has_help() -> None:
    for command, parameters in told_by_the_program().items():
        for parameter in parameters:
            assert parameter.help, (command, parameter.names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
