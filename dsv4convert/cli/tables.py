"""Tables of results: drawn on a terminal, aligned text elsewhere, with the same words in both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import typer

from ..errors import escape_control
from .saying import print_json
from .terminal import is_terminal

GAP = "  "


@dataclass(frozen=True)
class Table:
    """Rows under headings; ``numbers`` are the columns to align at the right.

    A row that continues the one above leaves its first cells empty.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()


# What a command prints, in order: lines of text and tables. A table without rows is left out.
Block = str | Table


def print_result(document: Mapping[str, Any], blocks: Iterable[Block], *, as_json: bool) -> None:
    """Print what a command found: as JSON, or as lines and tables."""
    if as_json:
        print_json(document)
    else:
        print_blocks(blocks)


def print_blocks(blocks: Iterable[Block]) -> None:
    """Print lines and tables for the place that stdout leads to."""
    if is_terminal():
        _draw(blocks)
    else:
        for line in plain(blocks):
            typer.echo(line)


def plain(blocks: Iterable[Block]) -> Iterator[str]:
    """Yield lines and tables as text without control characters."""
    for block in _spaced(blocks):
        yield from [escape_control(block)] if isinstance(block, str) else _aligned(block)


def _spaced(blocks: Iterable[Block]) -> Iterator[Block]:
    """Yield what there is to print, with an empty line before and after every table."""
    before: Block | None = None
    for block in blocks:
        if isinstance(block, Table) and not block.rows:
            continue
        if before is not None and Table in (type(before), type(block)):
            yield ""
        yield block
        before = block


def _aligned(table: Table) -> Iterator[str]:
    rows = [[escape_control(cell) for cell in row] for row in (table.headings, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(size) if number in table.numbers else cell.ljust(size)
            for number, (cell, size) in enumerate(zip(row, widths, strict=True))
        ]
        yield GAP.join(cells).rstrip()


def _draw(blocks: Iterable[Block]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as DrawnTable
    from rich.text import Text

    console = Console(highlight=False)
    for block in _spaced(blocks):
        if isinstance(block, str):
            console.print(Text(escape_control(block)))
        else:
            drawn = DrawnTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
            for number, heading in enumerate(block.headings):
                if number in block.numbers:
                    drawn.add_column(heading, justify="right", no_wrap=True)
                else:
                    drawn.add_column(heading, overflow="fold")
            for row in block.rows:
                drawn.add_row(*(Text(escape_control(cell)) for cell in row))
            console.print(drawn)
