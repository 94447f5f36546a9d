"""Tables of results: the same words on a terminal and elsewhere, aligned, whole, and without control characters."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections import Counter

import pytest

from dsv4convert.cli.tables import Table, plain, print_blocks
from dsv4convert.html_report.figures import human_bytes

BLOCKS = (
    "first line",
    Table(("name", "size"), [("a", "1"), ("a longer name", "12,345"), ("", "7")], frozenset({1})),
    Table(("nothing", "here"), []),
    Table(("x",), [("y",)]),
    "second line",
    "third line",
)


def test_plain_tables_are_aligned_with_an_empty_line_around_them() -> None:
    assert list(plain(BLOCKS)) == [
        "first line",
        "",
        "name             size",
        "a                   1",
        "a longer name  12,345",
        "                    7",
        "",
        "x",
        "y",
        "",
        "second line",
        "third line",
    ]


def test_a_table_that_comes_first_has_no_empty_line_above_it() -> None:
    assert next(iter(plain([Table(("x",), [("y",)])]))) == "x"


def test_cells_from_files_cannot_drive_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = [Table(("name",), [("a\x1b[31m\nb[bold]",)]), "c\x9bd"]
    assert list(plain(blocks)) == ["name", "a\\x1b[31m\\nb[bold]", "", "c\\x9bd"]
    monkeypatch.setattr("dsv4convert.cli.tables.is_terminal", lambda: True)
    print_blocks(blocks)
    drawn = capsys.readouterr().out
    assert "a\\x1b[31m\\nb[bold]" in drawn
    assert "c\\x9bd" in drawn


def on_a_terminal(columns: int, *arguments: object) -> str:
    """Return what the program prints to a terminal of so many columns, without its colours."""
    ours, theirs = pty.openpty()
    program = [sys.executable, "-m", "dsv4convert", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm-256color"}
    process = subprocess.Popen(program, stdout=theirs, stderr=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    printed = bytearray()
    try:
        while piece := os.read(ours, 65536):
            printed += piece
    except OSError:  # how the other end of a terminal says that it is closed
        pass
    os.close(ours)
    assert process.wait() in (0, 12)
    return re.sub("\x1b\\[[0-9;]*[a-zA-Z]", "", printed.decode()).replace("\r\n", "\n")


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    folder = tmp_path_factory.mktemp("tables")
    source, out = folder / "tiny", folder / "tiny.gguf"
    for arguments in (["synth", source, "-q"], ["hf-to-gguf", source, out, "-q"]):
        subprocess.run([sys.executable, "-m", "dsv4convert", *map(str, arguments)], check=True)
    return {
        "inspect folder": ["inspect", source],
        "inspect gguf": ["inspect", out],
        "verify": ["verify", source, out],
        "compare": ["compare", source, out, "--random", 4, "--layers", "0-1"],
        "dry run": ["shard", source, folder / "shards", "--mp", 2, "--dry-run"],
    }


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", ["inspect folder", "inspect gguf", "verify", "compare", "dry run"])
def test_a_terminal_gets_the_same_words_in_drawn_tables(
    name: str, columns: int, commands: dict[str, list[object]]
) -> None:
    drawn = on_a_terminal(columns, *commands[name])
    assert "───" in drawn
    assert max(map(len, drawn.splitlines())) <= columns
    assert "…" not in drawn
    program = [sys.executable, "-m", "dsv4convert", *map(str, commands[name])]
    text = subprocess.run(program, capture_output=True, text=True, check=False).stdout
    assert "───" not in text
    assert _characters(drawn) == _characters(text)


def _characters(text: str) -> Counter[str]:
    """Return the characters of a text without lines, spaces, times, rates and what memory and disk are free."""
    return Counter(re.sub(r"[\s─]", "", re.sub(r"[\d.,]+ (s|MB|GB|TB|MB/s)\b", "", text)))


def test_a_terminal_that_shows_only_text_gets_text(commands: dict[str, list[object]]) -> None:
    ours, theirs = pty.openpty()
    program = [sys.executable, "-m", "dsv4convert", *map(str, commands["inspect gguf"])]
    subprocess.run(program, stdout=theirs, check=True, env={**os.environ, "TERM": "dumb"})
    os.close(theirs)
    printed = os.read(ours, 65536).decode()
    os.close(ours)
    assert "───" not in printed
    assert "\x1b" not in printed


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (4_600_000_000, "4.60 GB"),
        (99_960, "100 kB"),
        (10**15, "1000 TB"),
    ],
)
def test_sizes_have_three_digits(size: int, text: str) -> None:
    assert human_bytes(size) == text
