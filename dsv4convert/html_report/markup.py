"""HTML and SVG put together so that no text can become markup: only ``element`` makes any, and it escapes the rest."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TypeAlias

from ..errors import escape_control

# Elements without content.
VOID = frozenset({"meta", "input"})
# Pixels of a character of a label, about.
CHARACTER_WIDTH = 6.2


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


# What an element can contain; None is left out.
Child: TypeAlias = "str | Markup | None"
Attribute: TypeAlias = "str | int | float | bool | None"


def escaped(text: str) -> Markup:
    """Return text as markup: what would be markup is escaped, and control characters are shown as escapes.

    >>> escaped("<b>\\n")
    '&lt;b&gt;\\\\n'
    """
    return text if isinstance(text, Markup) else Markup(escape(escape_control(text)))


def element(tag: str, /, *children: Child, **attributes: Attribute) -> Markup:
    """Return an element; a name of an attribute that Python does not allow is written with underscores.

    An attribute that is None or False is left out, one that is True has no value.

    >>> element("td", "a<b", class_="number", data_value=3)
    '<td class="number" data-value="3">a&lt;b</td>'
    """
    opening = [tag]
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        opening.append(name if value is True else f'{name}="{escaped(_written(value))}"')
    if tag in VOID:
        return Markup(f"<{' '.join(opening)}>")
    return Markup(f"<{' '.join(opening)}>{joined(children)}</{tag}>")


def joined(children: Iterable[Child]) -> Markup:
    """Return texts and markup one after another."""
    return Markup("".join(escaped(child) for child in children if child is not None))


def scrolled(label: str) -> dict[str, str]:
    """Return the attributes of what is wider than a phone and can be scrolled with the keyboard too."""
    return {"class_": "scroll", "role": "region", "tabindex": "0", "aria_label": label}


def fitting(text: str, width: float) -> str:
    """Return a text, cut where it is wider than ``width``."""
    most = max(1, int(width / CHARACTER_WIDTH))
    return text if len(text) <= most else text[: most - 1] + "…"


def _written(value: str | int | float) -> str:
    """Return an attribute's value; coordinates have two decimals at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
