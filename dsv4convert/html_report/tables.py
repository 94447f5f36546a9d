"""Tables that the page's script sorts and filters; without a script they are tables still."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

from ..errors import counted
from .markup import Markup, element, scrolled

# Rows that a page shows of a table: browsers lay out more of them slowly.
MAX_ROWS = 3000
# Tables of fewer rows have no field for a filter.
FILTERED_ROWS = 6


class Number(NamedTuple):
    """A number and how it is written; it sorts by its value."""

    value: float
    text: str


# What is written at the right of a column.
NUMBERS = (Number, int, float)

# A cell; None is an empty one.
Cell: TypeAlias = "str | int | float | Number | None"


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Markup | None:
    """Return a table under its title; None without rows."""
    kept = list(rows)
    if not kept:
        return None
    shown = kept[:MAX_ROWS]
    numeric = [any(isinstance(row[n], NUMBERS) for row in shown) for n in range(len(headings))]
    head = [
        element(
            "th",
            element("button", heading, type="button"),
            scope="col",
            aria_sort="none",
            class_="number" if is_number else None,
        )
        for heading, is_number in zip(headings, numeric, strict=True)
    ]
    body = [element("tr", *map(_cell, row)) for row in shown]
    filter_field = None
    if len(shown) >= FILTERED_ROWS:
        filter_field = element(
            "p",
            element("label", "Filter ", element("input", type="search", autocomplete="off")),
            element("output", counted(len(shown), "row")),
            class_="filter",
            hidden=True,
        )
    more = f"{len(kept) - len(shown):,} more rows are in the JSON that --json prints." if kept[MAX_ROWS:] else None
    return element(
        "section",
        element("h2", title),
        filter_field,
        element(
            "div",
            element("table", element("thead", element("tr", *head)), element("tbody", *body)),
            **scrolled(title),
        ),
        None if more is None else element("p", more),
        class_="table",
    )


def facts(title: str, pairs: Iterable[tuple[str, Cell]]) -> Markup | None:
    """Return names and values as a list under a title; pairs without a value are left out, None without pairs."""
    items = [
        element("div", element("dt", name), element("dd", _text(value)))
        for name, value in pairs
        if value is not None and value != ""
    ]
    return element("section", element("h2", title), element("dl", *items)) if items else None


def notes(title: str, lines: Iterable[str]) -> Markup | None:
    """Return lines as a list under a title; None without lines."""
    kept = list(lines)
    if not kept:
        return None
    shown = [element("li", line) for line in kept[:MAX_ROWS]]
    if kept[MAX_ROWS:]:
        shown.append(element("li", f"{len(kept) - MAX_ROWS:,} more are in the JSON that --json prints."))
    return element("section", element("h2", title), element("ul", *shown))


def _cell(value: Cell) -> Markup:
    if isinstance(value, str) or value is None:
        return element("td", _text(value))
    number = value.value if isinstance(value, Number) else value
    # As JavaScript writes it; NaN sorts as a text.
    written = repr(number) if math.isfinite(number) else "Infinity" if number > 0 else None
    return element("td", _text(value), class_="number", data_value=written)


def _text(value: Cell) -> str:
    if value is None:
        return ""
    if isinstance(value, Number):
        return value.text
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else value
