"""The bytes that every command writes are those on record."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from dsv4convert.cli import app

from .output_digests import CASES, RECORD, Outputs

RECORDED: dict[str, dict[str, str]] = json.loads(RECORD.read_text(encoding="utf-8"))

# Commands with an output whose bytes have no record (what imatrix sums up depends on the order in which a matrix
# library adds), and options that do not reach the bytes.
WITHOUT_RECORD = {"verify", "imatrix"}
WITHOUT_EFFECT = {"index", "progress"}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outputs]:
    made = Outputs(tmp_path_factory.mktemp("outputs"))
    yield made
    made.remove()


@pytest.mark.parametrize("case", sorted(CASES))
def test_output_bytes_are_those_on_record(case: str, outputs: Outputs) -> None:
    assert outputs.digests(case) == RECORDED[case], CASES[case]


def test_the_record_has_every_case_and_no_other() -> None:
    assert sorted(RECORDED) == sorted(CASES)


def test_the_path_of_a_folder_is_in_no_output(tmp_path: Path) -> None:
    case = "gguf/furnished/conventional"
    first, second = (Outputs(tmp_path / name).digests(case) for name in ("a", "another name"))
    assert first == second


def _choices() -> set[tuple[str, str]]:
    """Return every command that has an output, with no choice and with every choice of its options."""
    found = set()
    context = app.make_context("dsv4convert", [], resilient_parsing=True)
    for name in app.list_commands(context):
        command = app.get_command(context, name)
        assert command is not None
        if name in WITHOUT_RECORD or all(parameter.name != "out" for parameter in command.params):
            continue
        options = [parameter for parameter in command.params if parameter.name not in WITHOUT_EFFECT]
        kinds = [option.type for option in options if isinstance(option.type, click.Choice)]
        found |= {(name, choice) for choice in ["", *(choice for kind in kinds for choice in kind.choices)]}
    return found


@pytest.mark.parametrize(("command", "choice"), sorted(_choices()))
def test_every_choice_of_every_option_has_a_case(command: str, choice: str) -> None:
    lines = [words for words in map(shlex.split, CASES.values()) if words[0] == command]
    assert any(not choice or choice in words for words in lines), "give it a case in tests/output_digests.py"
