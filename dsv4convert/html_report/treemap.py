"""The model as a map: rectangles whose areas are bytes, the families of a layer together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from .charts import section
from .figures import human_bytes
from .markup import CHARACTER_WIDTH, Markup, element, fitting

WIDTH, HEIGHT = 900.0, 560.0
# Pixels around the families of a group, and above them where its name fits.
GAP, NAME_HEIGHT = 1.5, 13.0


class Leaf(NamedTuple):
    """A rectangle: the group that it is in, its name, its bytes, its kind, which gives the colour, and what to add."""

    group: str
    name: str
    nbytes: int
    kind: str
    note: str = ""


class Rectangle(NamedTuple):
    """Where something lies, in pixels."""

    x: float
    y: float
    width: float
    height: float


def squarified(sizes: Sequence[float], within: Rectangle) -> list[Rectangle]:
    """Return a rectangle for each size, largest first, that fill ``within`` and are as square as rows allow.

    The algorithm is that of Bruls, Huizing and van Wijk, "Squarified Treemaps" (2000). Sizes are above 0.

    >>> squarified([2, 1, 1], Rectangle(0, 0, 4, 1))[0]
    Rectangle(x=0, y=0, width=2.0, height=1.0)
    """
    placed: list[Rectangle] = []
    left, start = within, 0
    # Sums from each size on, the smallest first: a difference of large sums would lose the small ones.
    totals = [*accumulate(reversed(sizes))][::-1]
    while start < len(sizes):
        total = totals[start]
        side = min(left.width, left.height)
        scale = left.width * left.height / total if total else 0.0
        end = start + 1
        while end < len(sizes) and _worst(sizes[start : end + 1], scale, side) <= _worst(sizes[start:end], scale, side):
            end += 1
        row = sizes[start:end]
        part = sum(row) / total if end < len(sizes) else 1.0
        left = _lay(row, part, left, placed)
        start = end
    return placed


def _worst(row: Sequence[float], scale: float, side: float) -> float:
    """Return the largest ratio of sides in a row along ``side``; ``scale`` makes areas of sizes."""
    thickness = sum(row) * scale / side if side else 0.0
    if not thickness:
        return 1.0
    return max(max(size * scale / thickness**2, thickness**2 / (size * scale)) for size in row)


def _lay(row: Sequence[float], part: float, within: Rectangle, placed: list[Rectangle]) -> Rectangle:
    """Place a row along the shorter side, in that part of a rectangle; return what is left."""
    x, y, width, height = within
    total = sum(row)
    if width >= height:
        for size in row:
            length = height * (size / total)
            placed.append(Rectangle(x, y, width * part, length))
            y += length
        return Rectangle(x + width * part, within.y, width * (1 - part), height)
    for size in row:
        length = width * (size / total)
        placed.append(Rectangle(x, y, length, height * part))
        x += length
    return Rectangle(within.x, y + height * part, width, height * (1 - part))


def treemap(leaves: Sequence[Leaf], kinds: Sequence[str], title: str, classes: Sequence[str]) -> Markup | None:
    """Return the map with its legend, None without a leaf; ``kinds`` are the leaves' in the order of ``classes``."""
    groups: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        if leaf.nbytes > 0:
            groups.setdefault(leaf.group, []).append(leaf)
    if not groups:
        return None
    colour = dict(zip(kinds, classes, strict=False))
    ordered = sorted(groups.items(), key=lambda group: -sum(leaf.nbytes for leaf in group[1]))
    totals = [sum(leaf.nbytes for leaf in inside) for _, inside in ordered]
    shapes: list[Markup] = []
    for (name, inside), total, place in zip(
        ordered, totals, squarified(totals, Rectangle(0, 0, WIDTH, HEIGHT)), strict=True
    ):
        shapes += _group(name, sorted(inside, key=lambda leaf: -leaf.nbytes), total, place, colour)
    present = {leaf.kind for leaf in leaves if leaf.nbytes > 0}
    legend = [(kind, colour[kind]) for kind in kinds if kind in present]
    picture = element(
        "svg",
        *shapes,
        class_="map",
        viewBox=f"0 0 {WIDTH:.0f} {HEIGHT:.0f}",
        role="img",
        aria_label=f"{title}: {len(groups)} groups, {human_bytes(sum(totals))}",
    )
    return section(title, legend, picture)


def _group(name: str, leaves: Sequence[Leaf], total: int, place: Rectangle, colour: dict[str, str]) -> Iterator[Markup]:
    inner = Rectangle(place.x + GAP, place.y + GAP, place.width - 2 * GAP, place.height - 2 * GAP)
    if inner.width <= 0 or inner.height <= 0:
        return
    if inner.height > 3 * NAME_HEIGHT and inner.width > 3 * CHARACTER_WIDTH:
        yield element("text", fitting(name, inner.width), x=inner.x + 1, y=inner.y + 10, class_="group")
        inner = inner._replace(y=inner.y + NAME_HEIGHT, height=inner.height - NAME_HEIGHT)
    for leaf, at in zip(leaves, squarified([leaf.nbytes for leaf in leaves], inner), strict=True):
        note = f"; {leaf.note}" if leaf.note else ""
        told = f"{name}, {leaf.name}: {human_bytes(leaf.nbytes)}, {leaf.kind}{note}"
        yield element(
            "rect",
            element("title", told),
            x=at.x,
            y=at.y,
            width=max(0.0, at.width - 0.5),
            height=max(0.0, at.height - 0.5),
            class_=colour.get(leaf.kind, "c7"),
        )
        if at.height > NAME_HEIGHT and at.width > 4 * CHARACTER_WIDTH:
            yield element("text", fitting(leaf.name, at.width), x=at.x + 2, y=at.y + 11, class_="leaf")
