"""The documentation says what the program does: reference, links, no stray paths."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import NoneType

import click
import pytest

from dsv4convert.cli import app
from dsv4convert.cli.llama_cpp import LLAMA_CPP_OPTIONS

from .command_line import run_cli

ROOT = Path(__file__).resolve().parents[1]
ROOT_PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES = sorted([*ROOT_PAGES, *(ROOT / "docs").glob("*.md")])


def test_command_line_reference_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_cli_reference.py"))["reference"]()
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == made, "run docs/make_cli_reference.py"


# The page and --help are made by the same functions. Here both are held against what the parser accepts.

BEFORE = "Before the command"
ENTRY = re.compile(r"- `([^`]+)`: (.+)")


def told_by_the_page() -> dict[str, dict[str, str]]:
    """Return the entries of every section: how an argument or an option is written, and what is said of it."""
    told: dict[str, dict[str, str]] = {}
    section: dict[str, str] = {}
    for line in (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = told.setdefault(line.removeprefix("## "), {})
        elif found := ENTRY.fullmatch(line):
            assert found[1] not in section
            section[found[1]] = found[2]
    return {name: entries for name, entries in told.items() if entries}


def accepted_by_the_parser() -> dict[str, list[click.Parameter]]:
    context = app.make_context("dsv4convert", [], resilient_parsing=True)
    accepted = {BEFORE: app.params}
    for name in app.list_commands(context):
        command = app.get_command(context, name)
        assert command is not None
        accepted[name] = [p for p in command.params if not (isinstance(p, click.Option) and p.hidden)]
    return accepted


def test_the_page_has_what_the_parser_accepts_and_nothing_else() -> None:
    page, parser = told_by_the_page(), accepted_by_the_parser()
    assert list(page) == list(parser)
    for command, parameters in parser.items():
        assert len(page[command]) == len(parameters), command
        for parameter in parameters:
            (entry,) = (entry for entry in page[command] if _names(entry) == _spelt(parameter))
            text = page[command][entry]
            assert text.endswith(".")
            assert len(text) > len("Help.")
            if isinstance(parameter.type, click.Choice):
                assert entry.endswith(" " + "|".join(parameter.type.choices))
            if isinstance(parameter.type, click.IntRange) and parameter.type.max is not None:
                assert f"From {parameter.type.min} to {parameter.type.max}." in text
            if isinstance(parameter, click.Argument):
                assert entry.startswith("[") is not parameter.required
            elif not isinstance(parameter.default, bool | NoneType) and isinstance(
                parameter.default, str | int | float
            ):
                assert text.endswith(f" Default: {parameter.default}.")


def _names(entry: str) -> frozenset[str]:
    return frozenset(re.findall(r"(?<![\w.])--?[a-z][a-z0-9-]*", entry)) or frozenset({entry.strip("[]")})


def _spelt(parameter: click.Parameter) -> frozenset[str]:
    if isinstance(parameter, click.Argument):
        return frozenset({parameter.metavar or str(parameter.name).upper()})
    return frozenset({*parameter.opts, *parameter.secondary_opts})


def test_the_page_says_what_help_prints() -> None:
    for command, entries in told_by_the_page().items():
        printed = " ".join(run_cli(*([] if command == BEFORE else [command]), "--help").out.split())
        for entry, text in entries.items():
            assert f"{entry} {text}" in printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:dsv4convert|tests|benchmarks|docs|fixtures|schemas|scripts)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


# Options of other programs that pages speak of.
OTHERS_OPTIONS = {
    "--mtp",
    "--parse-special",
    "--target-model-dir",
    "--dspark",
    "--nproc-per-node",
    "--rounds",
    *LLAMA_CPP_OPTIONS,
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_that_a_page_names_are_accepted(page: Path) -> None:
    accepted = {
        flag
        for parameters in accepted_by_the_parser().values()
        for parameter in parameters
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", page.read_text(encoding="utf-8")))
    assert named <= accepted | OTHERS_OPTIONS
